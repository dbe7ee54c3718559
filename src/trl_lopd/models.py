"""Loading a model that samples or scores, its tokenizer, and the tokens that end its answers."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, find_adapter_config_file
from trl.trainer.utils import create_model_from_path


def as_name(model: Any) -> Any:
    """A path as the text that the libraries below take; anything else, such as a loaded model, as it is."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model


def load_model(model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """A model from a local directory or Hub id, in its own dtype; an adapter is merged into its base model.

    A loaded model is returned as it is.
    """
    if not isinstance(model, str):
        return model
    init_kwargs = {"dtype": "auto", **(init_kwargs or {})}
    if find_adapter_config_file(model, revision=init_kwargs.get("revision")) is not None:
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(model, **init_kwargs).merge_and_unload()
    try:
        return create_model_from_path(model, **init_kwargs)
    except TypeError as error:
        raise ValueError(f"{model} cannot be loaded with `model_init_kwargs={init_kwargs}`: {error}") from error


def hub_kwargs(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Of what a model is loaded with, what its other files are found and read with too."""
    init_kwargs = init_kwargs or {}
    return {"revision": init_kwargs.get("revision"), "trust_remote_code": init_kwargs.get("trust_remote_code", False)}


def pinned_kwargs(init_kwargs: dict[str, Any] | None) -> dict[str, str]:
    """What a resumed run must load a model with: all but where it is put."""
    kwargs = {"dtype": "auto", **(init_kwargs or {})}
    placement = ("device_map", "max_memory", "tensor_parallel_size", "gpu_memory_utilization")
    return {name: str(value) for name, value in kwargs.items() if name not in placement}


def load_tokenizer(model: str | PreTrainedModel, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory, Hub id or loaded model; that of its base for an adapter that has none.

    Raises:
        ValueError: If a loaded model does not say where it was loaded from.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise ValueError("The model does not say where it was loaded from: pass its tokenizer.")
    hub_kwargs = {"revision": kwargs.get("revision"), "_raise_exceptions_for_missing_entries": False}
    if (
        find_adapter_config_file(name, revision=kwargs.get("revision")) is not None
        and cached_file(name, "tokenizer_config.json", **hub_kwargs) is None
    ):
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(name, revision=kwargs.get("revision"))
        name, kwargs = adapter.base_model_name_or_path, {**kwargs, "revision": adapter.revision}
    return AutoTokenizer.from_pretrained(name, **kwargs)


def eos_token_ids(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[int, ...]:
    """The tokens that end an answer: those of the model's generation config and the tokenizer's. A model that is a
    path is not loaded for it."""
    if isinstance(model, str):
        if find_adapter_config_file(model, revision=revision) is not None:
            from peft import PeftConfig

            adapter = PeftConfig.from_pretrained(model, revision=revision)
            model, revision = adapter.base_model_name_or_path, adapter.revision
        try:
            generation_config = GenerationConfig.from_pretrained(model, revision=revision)
        except OSError:  # it has none
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
            generation_config = GenerationConfig.from_model_config(config)
    else:
        generation_config = model.generation_config
    of_model = generation_config.eos_token_id if generation_config is not None else None
    ids = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
