"""Loading of models that sample or score, their tokenizers, and the tokens that end their answers."""

from __future__ import annotations

import gc
import logging
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, find_adapter_config_file
from trl.trainer.utils import create_model_from_path

from .errors import TableError
from .own_logits import difference, own_logprobs, trial_rows

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)


def load_model(model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """Loads a model from a local directory or Hub id, in its own dtype.

    An adapter is merged into its base model. If merging would change its log-probabilities, it stays a `PeftModel`.

    A loaded model is returned unchanged.
    """
    if not isinstance(model, str):
        return model
    init_kwargs = {"dtype": "auto", **(init_kwargs or {})}
    if find_adapter_config_file(model, revision=init_kwargs.get("revision")) is not None:
        return _load_adapter(model, init_kwargs)
    try:
        return create_model_from_path(model, **init_kwargs)
    except TypeError as error:
        raise ValueError(f"{model} cannot be loaded with `model_init_kwargs={init_kwargs}`: {error}") from error


def _load_adapter(adapter: str, init_kwargs: dict[str, Any]) -> PreTrainedModel | PeftModel:
    from peft import AutoPeftModelForCausalLM, PromptLearningConfig

    init_kwargs = {"device_map": "auto", **init_kwargs}  # the same default as TRL's for whole models
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, **init_kwargs).eval()
    if any(isinstance(config, PromptLearningConfig) for config in model.peft_config.values()):
        return model
    rows, device = trial_rows(model.config), model.get_input_embeddings().weight.device
    before = [own_logprobs(model, row, device) for row in rows]
    model = model.merge_and_unload()
    change = difference([own_logprobs(model, row, device).logprobs for row in rows], before)
    if change is None:
        return model
    logger.warning(f"{adapter} is not merged into its base model, which would change what it computes ({change}).")
    return AutoPeftModelForCausalLM.from_pretrained(adapter, **init_kwargs).eval()


class Positions(NamedTuple):
    """
    Number of positions of a model.

    Attributes:
        limit (`int`, *optional*): Tokens of the longest row that a model is made for; `None` if its config names none.
        fails (`bool`): Whether it fails on longer rows, because it has an embedding for each position.
    """

    limit: int | None
    fails: bool


def positions_of(model: str | PreTrainedModel | PreTrainedConfig, **hub_kwargs: Any) -> Positions:
    """Returns how long a row a model can read, without loading its weights."""
    config = model if isinstance(model, PreTrainedConfig) else config_of(model, hub_kwargs)
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return Positions(None, False)
    if getattr(text, "rope_parameters", None):
        return Positions(limit, False)
    with torch.device("meta"):
        trust_remote_code = hub_kwargs.get("trust_remote_code", False)
        plain = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    # The position embeddings of some architectures have a few extra rows for padding.
    tables = (
        tensor
        for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]
        if re.search("pos|wpe", name) and tensor.dim() > 1 and any(limit <= n <= limit + 8 for n in tensor.shape)
    )
    return Positions(limit, next(tables, None) is not None)


def adapter_config(model: str, revision: str | None = None) -> PeftConfig | None:
    """Reads the config of an adapter, which names its base and the base's revision; `None` for a whole model."""
    if find_adapter_config_file(model, revision=revision) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(model, revision=revision)


def config_of(model: str | PreTrainedModel, hub_kwargs: dict[str, Any]) -> PreTrainedConfig:
    """Returns the config of a model; for an adapter, that of its base."""
    if not isinstance(model, str):
        return model.config
    if (adapter := adapter_config(model, hub_kwargs.get("revision"))) is not None:
        model, hub_kwargs = adapter.base_model_name_or_path, {**hub_kwargs, "revision": adapter.revision}
    return AutoConfig.from_pretrained(model, **hub_kwargs)


def free_memory() -> None:
    """Gives the memory of models that nothing refers to any more to those that are loaded next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_positions(tokens: np.ndarray, positions: Positions, model: str, what: str = "Row") -> None:
    """
    Checks that a model can read rows of these lengths. Warns if rows are longer than the model is made for.

    Args:
        tokens (`(rows,)` int): Number of tokens of each row.
        positions ([`Positions`]): Positions of the model.
        model (`str`): Name of the model in messages.
        what (`str`, *optional*, defaults to `"Row"`): Name of a row in messages.

    Raises:
        TableError: If a row is longer than the model can read.
    """
    if positions.limit is None or not (tokens > positions.limit).any():
        return
    row, count = int((tokens > positions.limit).argmax()), int((tokens > positions.limit).sum())
    longest = f"{what} {row} has {tokens[row]} tokens, more than the {positions.limit} positions of {model}"
    if positions.fails:
        raise TableError(f"{longest} ({count} such rows). Drop or shorten them.")
    logger.warning(
        f"{longest} ({count} such rows). It reads them with rotations that it was not trained on. See its "
        "documentation on `rope_parameters` in its config for whether it supports that."
    )


def stretches_from(config: PreTrainedConfig) -> float:
    """Returns the length from which the longest row of a batch changes the rotary embeddings of all rows. Such rows
    are read alone. It is infinite for most models."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {entry.get("rope_type"): entry for entry in [rope, *rope.values()] if isinstance(entry, dict)}
    if "longrope" in kinds:
        return kinds["longrope"].get("original_max_position_embeddings") or config.max_position_embeddings
    return config.max_position_embeddings if "dynamic" in kinds else math.inf


def hub_kwargs(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments for loading a model that also apply to its other files, such as config and tokenizer."""
    init_kwargs = init_kwargs or {}
    return {"revision": init_kwargs.get("revision"), "trust_remote_code": init_kwargs.get("trust_remote_code", False)}


# What a model is loaded with that leaves its function as the checkpoint defines it: where and how it is computed.
_PLACEMENT = (
    "device_map",
    "max_memory",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "offload_folder",
    "tp_plan",
)
_HARMLESS = {
    *_PLACEMENT,
    *("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "force_download", "proxies"),
    *("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config", "use_kernels"),
    *("low_cpu_mem_usage", "offload_state_dict", "offload_buffers", "use_cache", "weights_only"),
    # Of `vllm.LLM`.
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_logprobs", "logprobs_mode", "enforce_eager"),
    *("swap_space", "seed", "enable_prefix_caching", "quantization", "model_impl", "tokenizer_mode"),
}


def altering_kwargs(init_kwargs: dict[str, Any] | None) -> list[str]:
    """Returns the names of the loading options that may make a model another than its checkpoint, such as
    `num_hidden_layers`, `subfolder` or `variant`: a fingerprint of the checkpoint only declares what it is. Dropout is
    not one of them, since it is off where a model scores or samples."""
    return sorted(name for name in init_kwargs or {} if name not in _HARMLESS and "drop" not in name)


def warn_of_altering_kwargs(init_kwargs: dict[str, Any] | None, model: str) -> bool:
    """Warns of [`altering_kwargs`], and returns whether there are any."""
    if names := altering_kwargs(init_kwargs):
        logger.warning(
            f"{model} is loaded with {', '.join(f'`{name}`' for name in names)}, which may make it another model than "
            "its checkpoint. That it is the one that the fingerprint names counts as declared."
        )
    return bool(names)


def pinned_kwargs(init_kwargs: dict[str, Any] | None) -> dict[str, str]:
    """Returns the loading arguments that must not change in a resumed run: all except those for device placement."""
    kwargs = {"dtype": "auto", **(init_kwargs or {})}
    return {name: str(value) for name, value in kwargs.items() if name not in _PLACEMENT}


def load_tokenizer(model: str | PreTrainedModel, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local directory, Hub id or loaded model; for an adapter without one, that of its base.

    Raises:
        ValueError: If a loaded model does not say where it was loaded from, or no tokenizer can be loaded.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise ValueError("The model does not say where it was loaded from: pass its tokenizer.")
    hub_kwargs = {"revision": kwargs.get("revision"), "_raise_exceptions_for_missing_entries": False}
    is_adapter = find_adapter_config_file(name, revision=kwargs.get("revision")) is not None
    if is_adapter and cached_file(name, "tokenizer_config.json", **hub_kwargs) is None:
        adapter = adapter_config(name, kwargs.get("revision"))
        name, kwargs = adapter.base_model_name_or_path, {**kwargs, "revision": adapter.revision}
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer can be loaded from {name}: {' '.join(str(error).split())}") from error


def eos_token_ids(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[int, ...]:
    """Returns the ids of the tokens that end an answer: those of the model's generation config and the tokenizer's.

    If `model` is a path, its weights are not loaded.
    """
    if isinstance(model, str):
        if (adapter := adapter_config(model, revision)) is not None:
            model, revision = adapter.base_model_name_or_path, adapter.revision
        try:
            generation_config = GenerationConfig.from_pretrained(model, revision=revision)
        except OSError:  # the model has no generation config
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
            generation_config = GenerationConfig.from_model_config(config)
    else:
        generation_config = model.generation_config
    model_ids = generation_config.eos_token_id if generation_config is not None else None
    ids = [*(model_ids if isinstance(model_ids, list) else [model_ids]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
