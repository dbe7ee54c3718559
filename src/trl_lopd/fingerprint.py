"""What a teacher is: the content identity of its weights, its tokenizer and its chat template.

Lightning OPD (arXiv 2604.13010) holds only if the teacher that wrote the SFT answers is the teacher that scores the
rollouts. Names do not settle that question (a directory is renamed, a Hub repository is updated in place), so a
teacher is named by what it contains. Two copies of a model agree however they are stored: as one file or in shards, on
disk or loaded, with a tied head written out or left out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Part of every id: a change in what is hashed must never make two different definitions compare equal.
SCHEMA_VERSION = 1

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]
# A second copy of the weights in another layout, which transformers does not read.
HUB_FILES_TO_SKIP = ["consolidated*", "original/*", "onnx/*"]


@dataclass(frozen=True)
class TeacherFingerprint:
    """
    Identity of a teacher: three content digests, and a name for people.

    Args:
        name (`str`): Last component of the model id or directory. Never compared.
        weights (`str`): Hex digest of the weights.
        tokenizer (`str`): Hex digest of what turns text into token ids.
        chat_template (`str`): Hex digest of the chat template; that of the empty string if there is none.
    """

    name: str
    weights: str
    tokenizer: str
    chat_template: str

    @property
    def id(self) -> str:
        """`name@digest`, 16 hex characters: the string in the table's `teacher_fingerprint` column."""
        content = [SCHEMA_VERSION, self.weights, self.tokenizer, self.chat_template]
        return f"{self.name}@{_json_digest(content)[:16]}"

    def to_dict(self) -> dict[str, str]:
        """The record that a card holds: `id`, `name`, `weights`, `tokenizer`, `chat_template`."""
        return {
            "id": self.id,
            "name": self.name,
            "weights": self.weights,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> TeacherFingerprint:
        """
        The inverse of [`to_dict`]. Keys it does not know are ignored.

        Raises:
            `ValueError`: if a field is missing or not a string, or if `id` is given and does not follow from the
                digests.
        """
        fields = ("name", "weights", "tokenizer", "chat_template")
        if bad := [field for field in fields if not isinstance(record.get(field), str)]:
            raise ValueError(f"Not a full teacher record: {', '.join(bad)} missing or not a string in {record!r}.")
        fingerprint = cls(**{field: record[field] for field in fields})
        if "id" in record and record["id"] != fingerprint.id:
            raise ValueError(
                f"The teacher record says id {record['id']!r}, but its digests give {fingerprint.id!r}: it was edited "
                "by hand, or written under another fingerprint schema."
            )
        return fingerprint


def content_id(fingerprint_id: str) -> str:
    """The part of a fingerprint id after its last `@`. Two ids name the same teacher iff these are equal."""
    return fingerprint_id.rpartition("@")[2]


def same_teacher(a: TeacherFingerprint | str, b: TeacherFingerprint | str) -> bool:
    """Whether two fingerprints, or ids of fingerprints, name the same teacher, whatever names they carry."""
    first, second = (content_id(x if isinstance(x, str) else x.id) for x in (a, b))
    return first == second


def fingerprint_teacher(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
) -> TeacherFingerprint:
    """
    Fingerprint a teacher from its content.

    A directory is hashed from its safetensors files, by memory map, so it may be larger than memory. A loaded model
    gets the digest of the directory that its `save_pretrained` would write.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): Local directory, Hub model id, or loaded model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Defaults to the one in the directory, or for a loaded model
            the one at `model.config._name_or_path`.
        name (`str`, *optional*): Defaults to the last component of the model id or directory.
        revision (`str`, *optional*): Hub revision. Ignored for a local directory and for a loaded model.

    Raises:
        `FileNotFoundError`: if the directory has no safetensors weights, or if one of its shards is missing.
        `ValueError`: if the directory or the model is an unmerged adapter, if a sharded checkpoint contradicts its
            index, if the model is quantized, sharded over processes or not in memory, or if it says nothing of where
            its tokenizer is.
        `TypeError`: if `model` is none of the three.
    """
    from transformers import AutoTokenizer, PreTrainedModel

    if isinstance(model, str | Path):
        directory = Path(model)
        if directory.is_dir():
            source = str(directory.resolve())
        else:
            from huggingface_hub import snapshot_download

            source = str(model)
            directory = Path(
                snapshot_download(
                    source, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_TO_SKIP
                )
            )
        weights = _directory_digest(directory)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(directory)
    elif isinstance(model, PreTrainedModel):
        source = model.config._name_or_path or type(model).__name__
        if tokenizer is None:
            if not model.config._name_or_path:
                raise ValueError(
                    f"This {type(model).__name__} does not say where it was loaded from (config._name_or_path is "
                    "empty), so its tokenizer cannot be found. Pass `tokenizer`."
                )
            tokenizer = AutoTokenizer.from_pretrained(source)
        weights = _module_digest(model)
    else:
        raise TypeError(
            "Expected a local directory, a Hub model id or a transformers PreTrainedModel, got "
            f"{type(model).__name__}. Unwrap a wrapped model first; merge adapters into it (PEFT: "
            "`model.merge_and_unload()`)."
        )
    return TeacherFingerprint(
        name=name or Path(source).name,
        weights=weights,
        tokenizer=_tokenizer_digest(tokenizer),
        chat_template=_chat_template_digest(tokenizer.chat_template),
    )


def _json_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A vocabulary may hold lone surrogates (byte-level pieces), which strict UTF-8 refuses.
    return blake3(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _chat_template_digest(chat_template: str | dict[str, str] | None) -> str:
    if isinstance(chat_template, dict):
        return _json_digest(chat_template)
    return blake3((chat_template or "").encode()).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Digest of what decides token ids. Truncation, padding (the choice of a pad token included: training scripts set it
    freely), post-processing and decoding are left out.
    """
    special_tokens = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if role != "pad_token"}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = {part: backend[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    else:
        parts = {"vocab": tokenizer.get_vocab()}
    return _json_digest({**parts, "special_tokens": special_tokens})


def _tensor_entry(tensor: torch.Tensor) -> str:
    """`dtype shape digest` of one tensor. Reads its bytes where they lie if it is contiguous and on the CPU."""
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = "x".join(map(str, tensor.shape))
    return f"{dtype} [{shape}] {blake3(data, max_threads=blake3.AUTO).hexdigest()}"


def _weights_digest(entries: dict[str, str], model: PreTrainedModel) -> str:
    """
    Digest of a checkpoint.

    Args:
        entries (`dict[str, str]`): Tensor entry by the name that the tensor has in a saved checkpoint.
        model (`PreTrainedModel`): Says which names are tied; may be on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def saved_name(name: str) -> str:
        # The name in the module is not the name in the file for models whose checkpoints transformers converts.
        return next(iter(revert_weight_conversion(model, {name: model.get_parameter_or_buffer(name)})))

    entries = dict(entries)
    for tied, kept in model.all_tied_weights_keys.items():
        tied, kept = saved_name(tied), saved_name(kept)
        # transformers ties what its config declares, under whichever of the names is there, unless both are there and
        # differ: then both count.
        if tied in entries and entries.setdefault(kept, entries[tied]) == entries[tied]:
            del entries[tied]
    return blake3("\n".join(f"{name} {entry}" for name, entry in sorted(entries.items())).encode()).hexdigest()


def _directory_digest(directory: Path) -> str:
    import torch
    import transformers
    from safetensors import safe_open

    files = _safetensors_files(directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    # The class that wrote the checkpoint knows what it tied; the auto class stands in for one transformers lacks.
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if model_class is not None:
            model = model_class(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    # What transformers drops on loading is no part of the teacher: a loaded copy does not have it. The second pattern
    # is a buffer of old checkpoints, which transformers drops for all models rather than model by model.
    dropped = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]

    entries: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                if any(re.search(pattern, key) for pattern in dropped):
                    continue
                if key in entries:
                    raise ValueError(f"{directory}: {key!r} is in more than one safetensors file.")
                entries[key] = _tensor_entry(tensors.get_tensor(key))
    return _weights_digest(entries, model)


def _safetensors_files(directory: Path) -> list[Path]:
    """The weight files that transformers would load, in the order in which it looks for them."""
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} holds an adapter, not a whole model. Merge it into its base model, save that, and "
            "fingerprint the result."
        )
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [shard for shard in shards if not (directory / shard).is_file()]:
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}.")
        return [directory / shard for shard in shards]
    raise FileNotFoundError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json. Pickled weights (.bin, .pt) are "
        "never loaded: re-save the model as safetensors with `model.save_pretrained(directory)`."
    )


def _module_digest(model: PreTrainedModel) -> str:
    from torch.distributed.tensor import DTensor
    from transformers.core_model_loading import revert_weight_conversion

    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model carries an unmerged adapter. Merge it, save the result, and fingerprint that.")

    advice = "Fingerprint the directory or Hub id that it was loaded from instead."
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(f"The model is quantized: its tensors are not those of its checkpoint. {advice}")
    for name, parameter in model.named_parameters():
        # DeepSpeed ZeRO-3 marks the parameters it partitions with `ds_id`; FSDP2 and tensor parallelism use DTensor.
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise ValueError(f"The model is sharded over processes ({name}): this one holds a part of it. {advice}")
        if parameter.device.type == "meta":
            raise ValueError(f"The model is not in memory ({name} is on the meta device). {advice}")

    state_dict = model.state_dict()
    for key in model._keys_to_ignore_on_save or ():
        state_dict.pop(key, None)
    state_dict = revert_weight_conversion(model, state_dict)
    return _weights_digest({name: _tensor_entry(tensor) for name, tensor in state_dict.items()}, model)
