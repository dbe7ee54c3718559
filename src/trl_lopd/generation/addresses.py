"""Addresses of servers in place of models: detection of the kind of server and of the model that it serves."""

from __future__ import annotations

from typing import Any

import httpx

from ..errors import ServerError
from .servers import SGLangServer, VLLMServer, authorization


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
    owner = _served(VLLMServer(address))[0].get("owned_by")
    return create_client(SGLangServer if owner == "sglang" else VLLMServer, address, kwargs)


def served_model(address: str) -> str:
    """
    Returns the directory or Hub id that a server was started with.

    Raises:
        ServerError: If no server answers, or it serves several models.
    """
    served = _served(VLLMServer(address))
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


def _served(client: VLLMServer) -> list[dict[str, Any]]:
    """Asks a server for the models that it serves."""
    url = f"{client.base_url}/v1/models"
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=3), headers=authorization(), timeout=30) as http:
            response = http.get(url).raise_for_status()
        served = response.json()["data"]
        if not served or not all(isinstance(entry, dict) and entry.get("id") for entry in served):
            raise ValueError("it serves nothing")
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"{url} does not say what is served there ({type(error).__name__}: {error}). Is the server up, and "
            "reachable from here?"
        ) from None
    return served
