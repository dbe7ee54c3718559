"""Addresses of servers in place of models: detection of the kind of server and of the model that it serves."""

from __future__ import annotations

from typing import Any

from ..errors import ServerError
from .servers import SGLangServer, VLLMServer


def is_address(model: Any) -> bool:
    """Returns whether a model is given by the address of its server, such as `"http://localhost:8000"`."""
    return isinstance(model, str) and model.startswith(("http://", "https://"))


def server_at(address: str, **kwargs: Any) -> VLLMServer | SGLangServer:
    """
    Creates a client for the server at an address. The server is asked whether it is vLLM or SGLang.

    Args:
        address (`str`): Address of the server, such as `"http://localhost:8000"`.
        **kwargs: Options of the client, such as `max_concurrency`.

    Raises:
        ServerError: If no server answers.
        ValueError: If `address` is not an address, or an option is unknown.
    """
    owner = _served(address)[0].get("owned_by")
    return create_client(SGLangServer if owner == "sglang" else VLLMServer, address, kwargs)


def served_model(address: str) -> str:
    """
    Returns the directory or Hub id that a server was started with.

    Raises:
        ServerError: If no server answers, or it serves several models.
    """
    served = _served(address)
    if len(served) != 1:
        names = [entry.get("id") for entry in served]
        raise ServerError(
            f"{address} serves {names}. Give the model by its directory or Hub id, and the server as "
            f"`engine=VLLMServer({address!r}, model=...)`."
        )
    return served[0].get("root") or served[0]["id"]


def create_client(kind: type, address: str, kwargs: dict[str, Any] | None) -> VLLMServer | SGLangServer:
    """
    Creates a client with the options in `server_kwargs`.

    Raises:
        ValueError: If an option is unknown.
    """
    try:
        return kind(address, **(kwargs or {}))
    except TypeError as error:
        raise ValueError(f"`server_kwargs`: {error}") from error


def _served(address: str) -> list[dict[str, Any]]:
    # With a model, the client does not look for the only one that is served.
    served = VLLMServer(address, model="any", timeout=30, max_retries=0).served()
    if not served:
        raise ServerError(f"{address} serves no model.")
    return served
