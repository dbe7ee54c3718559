"""What a teacher is: the content identity of its weights, its tokenizer and its chat template.

Lightning OPD (arXiv 2604.13010) holds only if the teacher that wrote the SFT answers is the teacher that scores the
rollouts. Names do not settle that question (a directory is renamed, a Hub repository is updated in place), so a
teacher is named by what it contains. Two copies of a model agree however they are stored: as one file or in shards, on
disk, loaded or sharded over processes, with a tied head written out or left out.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Part of every id: a change in what is hashed must never make two different definitions compare equal.
SCHEMA_VERSION = 1
# How a fingerprint is known, strongest first: computed from content, matched by behaviour, stated by a person.
EVIDENCE = ("verified", "probed", "declared")

# How two ids or fingerprints differ, in words.
WEIGHTS_DIFFER = "the weights differ"
TOKENIZER_DIFFERS = "the tokenizer differs"
TEMPLATE_DIFFERS = "the chat template differs"
SCHEMA_DIFFERS = "written under another fingerprint schema"

ID = re.compile(r"[^#\s]*@\d+-[0-9a-f]{12}-[0-9a-f]{8}-[0-9a-f]{8}(#(probed|declared))?")

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]
# A second copy of the weights in another layout, which transformers does not read.
HUB_FILES_TO_SKIP = ["consolidated*", "original/*", "onnx/*"]

ADAPTER_CONFIG = "adapter_config.json"
# What does not decide an adapter's function, or is told by the names and shapes of its tensors.
ADAPTER_CONFIG_TO_SKIP = {
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type"),
    *("target_modules", "exclude_modules", "modules_to_save", "lora_dropout"),
}
# Components that PEFT puts into the names of a base model's tensors.
PEFT_WRAPPERS = {"base_layer", "original_module", "token_adapter"}

# Smaller checkpoints are hashed before a bar would be seen.
PROGRESS_MIN_BYTES = 10**9


@dataclass(frozen=True)
class TeacherFingerprint:
    """
    Identity of a teacher: its content digests, and what a person wants to know of it. Two fingerprints are equal if
    their content is: `model_id` and what follows it are never compared.

    Args:
        weights (`str`): Hex digest of the weights; for an adapter, of its base's.
        tokenizer (`str`): Hex digest of what turns text into token ids.
        chat_template (`str`): Hex digest of the chat template; that of the empty string if there is none.
        adapter (`str`, *optional*): Hex digest of the adapter over the base. `None` for a whole model.
        schema (`int`): Version of the digests' definition.
        model_id (`str`): Hub id, or last component of the directory; for an adapter `base+adapter`, last components.
        revision (`str`, *optional*): Commit on the Hub; for an adapter `base+adapter`, with `?` for one not known.
        dtype (`str`, *optional*): The dtype that holds most of the weights' elements.
        parameters (`int`, *optional*): Elements of the weights, each tied tensor counted once.
        architecture (`str`, *optional*): Model class.
        library (`str`, *optional*): What read the model, and its version.
    """

    weights: str
    tokenizer: str
    chat_template: str
    adapter: str | None = None
    schema: int = SCHEMA_VERSION
    model_id: str = field(default="", compare=False)
    revision: str | None = field(default=None, compare=False)
    dtype: str | None = field(default=None, compare=False)
    parameters: int | None = field(default=None, compare=False)
    architecture: str | None = field(default=None, compare=False)
    library: str | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """
        `name@schema-weights-tokenizer-template`, with 12, 8 and 8 hex characters: the string in the table's
        `teacher_fingerprint` column.
        """
        weights = self.weights if self.adapter is None else _json_digest([self.weights, self.adapter])
        # `#` starts the evidence, and an id must stay one word.
        name = re.sub(r"[#\s]", "-", self.name)
        return f"{name}@{self.schema}-{weights[:12]}-{self.tokenizer[:8]}-{self.chat_template[:8]}"

    @property
    def name(self) -> str:
        """Last component of `model_id`."""
        return self.model_id.rpartition("/")[2]

    def to_dict(self) -> dict[str, Any]:
        """The record that a card holds: `id`, then the fields that are not `None`."""
        return {"id": self.id} | {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> TeacherFingerprint:
        """
        The inverse of [`to_dict`]. Keys it does not know are ignored.

        Raises:
            `ValueError`: if a digest is missing or not a string, if the record has another schema, or if `id` is given
                and does not follow from the digests.
        """
        if (schema := record.get("schema", SCHEMA_VERSION)) != SCHEMA_VERSION:
            raise ValueError(
                f"The teacher record {record.get('id', '')!r} has fingerprint schema {schema!r}, this version of "
                f"trl-lopd has {SCHEMA_VERSION}: it was written by another version. Install that version, or "
                "fingerprint the teacher again with this one."
            )
        digests = ["weights", "tokenizer", "chat_template"] + ["adapter"] * (record.get("adapter") is not None)
        if bad := [key for key in digests if not isinstance(record.get(key), str)]:
            raise ValueError(f"Not a full teacher record: {', '.join(bad)} missing or not a string in {record!r}.")
        fingerprint = cls(**{key: record[key] for key in cls.__dataclass_fields__ if key in record})
        if "id" in record and content_id(record["id"]) != content_id(fingerprint.id):
            raise ValueError(
                f"The teacher record says id {record['id']!r}, but its digests give {fingerprint.id!r}: it was edited "
                "by hand, or written by another version of trl-lopd. Fingerprint the teacher again."
            )
        return fingerprint


def content_id(fingerprint_id: str) -> str:
    """The part of an id that names the content: after its last `@`, without evidence. Empty if there is none."""
    _, at, content = fingerprint_id.rpartition("@")
    return content.partition("#")[0] if at else ""


def weights_part(fingerprint_id: str) -> str:
    """The part of an id that names the weights; empty if it is no id."""
    return content_id(fingerprint_id).split("-")[1] if is_id(fingerprint_id) else ""


def tokenizer_part(fingerprint_id: str) -> str:
    """The part of an id that names the tokenizer; empty if it is no id."""
    return content_id(fingerprint_id).split("-")[2] if is_id(fingerprint_id) else ""


def evidence_of(fingerprint_id: str) -> str:
    """How an id is known, one of [`EVIDENCE`]: `"verified"` if it carries no suffix."""
    return fingerprint_id.rpartition("@")[2].partition("#")[2] or EVIDENCE[0]


def with_evidence(fingerprint_id: str, evidence: str) -> str:
    """The id with another suffix for how it is known, one of [`EVIDENCE`]."""
    name, at, content = fingerprint_id.rpartition("@")
    suffix = "" if evidence == EVIDENCE[0] else f"#{evidence}"
    return f"{name}{at}{content.partition('#')[0]}{suffix}"


def is_id(text: str) -> bool:
    """Whether a string is a full id, of whichever schema: see [`TeacherFingerprint.id`]."""
    return ID.fullmatch(text) is not None


def same_teacher(a: TeacherFingerprint | str, b: TeacherFingerprint | str) -> bool:
    """Whether two fingerprints, or ids of fingerprints, name the same teacher, whatever names they carry."""
    first, second = (content_id(x if isinstance(x, str) else x.id) for x in (a, b))
    return first == second != ""


def diff_ids(a: str, b: str) -> list[str]:
    """What differs between the contents that two ids name, in words: a phrase each. Empty if nothing does."""
    if same_teacher(a, b):
        return []
    if not (is_id(a) and is_id(b)):
        return ["the content differs"]
    (schema, *digests), (other_schema, *others) = (content_id(x).split("-") for x in (a, b))
    if schema != other_schema:
        return [SCHEMA_DIFFERS]
    phrases = (WEIGHTS_DIFFER, TOKENIZER_DIFFERS, TEMPLATE_DIFFERS)
    return [phrase for phrase, x, y in zip(phrases, digests, others, strict=True) if x != y]


def fingerprint_teacher(
    model: str | Path | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TeacherFingerprint:
    """
    Fingerprint a teacher from its content.

    A directory is hashed from its memory-mapped safetensors files, so it may be larger than memory. A loaded model
    gets the digest of the directory that its `save_pretrained` would write. If it is sharded over processes (DeepSpeed
    ZeRO-3, FSDP2), every process has to call this; all get the same answer, and each holds one layer at a time.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`): Local directory, Hub model id, or loaded model, which
            may be wrapped (DDP, DeepSpeed, `torch.compile`). May be a PEFT adapter over a base model: then both count.
        processing_class (`PreTrainedTokenizerBase`, *optional*): The tokenizer. Defaults to the one in the directory
            (an adapter's own, else its base's), or for a loaded model the one at `model.config._name_or_path`.
        name (`str`, *optional*): Replaces the model id, for people.
        revision (`str`, *optional*): Hub revision. Ignored for a local directory and for a loaded model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the model and tokenizer code that comes with
            the weights.

    Raises:
        `FileNotFoundError`: if there are no safetensors weights, if one of the shards is missing, or if an adapter's
            base is out of reach.
        `ValueError`: if a file is truncated or corrupt, if a sharded checkpoint contradicts its index, if a loaded
            model is quantized, wrapped by FSDP1, not in memory or has several active adapters or merged ones, or if it
            says nothing of where its tokenizer is; from transformers, if the model needs `trust_remote_code`.
        `TypeError`: if `model` is none of those.
    """
    import transformers

    adapter = None
    if isinstance(model, str | Path):
        origin = base = _locate(model, revision, trust_remote_code)
        tokenizer_source = origin.path
        if (origin.path / ADAPTER_CONFIG).is_file():
            base = _locate_base(origin, trust_remote_code)
            adapter = _saved_adapter_digest(origin.path)
            if not any((origin.path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
                tokenizer_source = base.path
            origin = _over(base, origin)
        weights = _saved_weights(base.path, trust_remote_code)
    else:
        module, peft_model = _unwrap(model)
        origin = base = _origin_of_loaded(module)
        tokenizer_source = module.config._name_or_path
        if processing_class is None and not tokenizer_source:
            raise ValueError(
                f"This {type(module).__name__} does not say where it was loaded from (config._name_or_path is empty), "
                "so its tokenizer cannot be found. Pass its `processing_class`."
            )
        if peft_model is not None:
            active = _active_adapter(peft_model)
            adapter = _loaded_adapter_digest(peft_model, active)
            origin = _over(base, _Origin(None, active, None))
        weights = _loaded_weights(module, is_peft_base=peft_model is not None)
    tokenizer = processing_class
    if tokenizer is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            tokenizer_source, revision=base.revision, trust_remote_code=trust_remote_code
        )
    return TeacherFingerprint(
        weights=weights.digest,
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=_chat_template_digest(tokenizer.chat_template),
        adapter=adapter,
        model_id=name or origin.model_id,
        revision=origin.revision,
        dtype=weights.dtype,
        parameters=weights.parameters,
        architecture=weights.architecture,
        library=f"transformers {transformers.__version__}",
    )


def fingerprint_loaded(
    model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | None = None
) -> TeacherFingerprint:
    """
    Fingerprint of a loaded model as the checkpoint that it was loaded from, where it still holds what is in there,
    cast to another dtype or not; otherwise as [`fingerprint_teacher`] gives it, by what is in memory.

    An adapter that has learnt nothing yet counts as none. A collective if the model is sharded.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The loaded model.
        processing_class (`PreTrainedTokenizerBase`, *optional*): As in [`fingerprint_teacher`].

    Raises:
        `FileNotFoundError`, `ValueError`, `TypeError`: as [`fingerprint_teacher`].
    """
    module, peft_model = _unwrap(model)
    tensors = _loaded_tensors(module, is_peft_base=peft_model is not None)
    if peft_model is None or _has_learnt_nothing(peft_model):
        for directory in _checkpoints_of(module):
            if _holds(module, tensors, directory):
                return fingerprint_teacher(directory, processing_class)
    return fingerprint_teacher(model, processing_class)


class _Origin(NamedTuple):
    path: Path | None
    model_id: str
    revision: str | None


class _Weights(NamedTuple):
    digest: str
    dtype: str | None
    parameters: int
    architecture: str


# Where a model comes from


def _locate(model: str | Path, revision: str | None, trust_remote_code: bool) -> _Origin:
    path = Path(model)
    if path.is_dir():
        return _origin_of_directory(path)
    if path.is_absolute() or str(model).startswith("."):
        raise FileNotFoundError(f"There is no directory {model}. Pass a local directory or a Hub model id.")

    from huggingface_hub import snapshot_download

    files = HUB_FILES + ["*.py"] * trust_remote_code
    path = Path(
        snapshot_download(str(model), revision=revision, allow_patterns=files, ignore_patterns=HUB_FILES_TO_SKIP)
    )
    return _Origin(path, str(model), path.name)


def _origin_of_directory(path: Path) -> _Origin:
    path = path.resolve()
    if path.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", path.name):
        # A snapshot in the Hub's cache is named after its commit, and lies under the name of its repository.
        return _Origin(path, path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name)
    return _Origin(path, path.name, None)


def _origin_of_loaded(model: PreTrainedModel) -> _Origin:
    source, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    if source and Path(source).is_dir():
        return _origin_of_directory(Path(source))
    if commit is not None:
        return _Origin(None, source, commit)
    # Nothing says that this is a Hub id: it may be the path of a directory that is gone.
    return _Origin(None, Path(source).name or type(model).__name__, None)


def _locate_base(adapter: _Origin, trust_remote_code: bool) -> _Origin:
    config = json.loads((adapter.path / ADAPTER_CONFIG).read_text())
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{adapter.path / ADAPTER_CONFIG} names no base model, so there is nothing to fingerprint the adapter "
            "over. Set its base_model_name_or_path to the directory or Hub id of the base."
        )
    if (adapter.path / base).is_dir() and not Path(base).is_dir():
        base = adapter.path / base
    try:
        origin = _locate(base, config.get("revision"), trust_remote_code)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The adapter {adapter.path} is over the base model {base}, which is out of reach: {error} Download the "
            f"base, or set base_model_name_or_path in {ADAPTER_CONFIG} to where it is."
        ) from error
    if (origin.path / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"The adapter {adapter.path} is over {origin.path}, which is itself an adapter. Merge that one into its "
            "base, save the result, and name it as the base."
        )
    return origin


def _over(base: _Origin, adapter: _Origin) -> _Origin:
    """The origin of an adapter over its base."""
    model_id = "+".join(origin.model_id.rpartition("/")[2] for origin in (base, adapter))
    revisions = [base.revision, adapter.revision]
    revision = "+".join(revision or "?" for revision in revisions) if any(revisions) else None
    return _Origin(adapter.path, model_id, revision)


def _unwrap(model: Any) -> tuple[PreTrainedModel, Any]:
    """The transformers model inside whatever wraps it, and the `PeftModel` around it or `None`."""
    import torch
    from transformers import PreTrainedModel

    # Who has a PeftModel has imported peft.
    peft = sys.modules.get("peft")
    kinds = (PreTrainedModel,) if peft is None else (PreTrainedModel, peft.PeftModel)
    if isinstance(model, torch.nn.Module):
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                "The model is wrapped by FSDP1 (FullyShardedDataParallel), which flattens its tensors. Use FSDP2 "
                "(`fully_shard`; accelerate: `fsdp_version: 2`), or fingerprint the directory or Hub id that it was "
                "loaded from."
            )
        if not isinstance(model, kinds):
            from accelerate.utils import extract_model_from_parallel

            model = extract_model_from_parallel(model, keep_torch_compile=False)
    peft_model = model if peft is not None and isinstance(model, peft.PeftModel) else None
    if peft_model is not None:
        model = peft_model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            "Expected a local directory, a Hub model id, a transformers PreTrainedModel or a PeftModel over one, got "
            f"{type(model).__name__}."
        )
    return model, peft_model


# Tokenizer and chat template


def _json_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A vocabulary may hold lone surrogates (byte-level pieces), which strict UTF-8 refuses.
    return blake3(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _chat_template_digest(chat_template: str | dict[str, str] | None) -> str:
    if isinstance(chat_template, dict):
        return _json_digest(chat_template)
    return blake3((chat_template or "").encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
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


# Weights: digests of tensors, and of the whole


def _entry(dtype: torch.dtype, shape: Iterable[int], digest: str) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{'x'.join(map(str, shape))}] {digest}"


def _tensor_entry(tensor: torch.Tensor) -> str:
    """`dtype [shape] digest` of one tensor. Reads its bytes where they lie if it is contiguous and on the CPU."""
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _entry(tensor.dtype, tensor.shape, blake3(data, max_threads=blake3.AUTO).hexdigest())


def _summarize(
    entries: dict[str, str], model: PreTrainedModel, tensors: dict[str, torch.Tensor], architecture: str
) -> _Weights:
    """
    The digest of a checkpoint, and what a person wants to know of it.

    Args:
        entries (`dict[str, str]`): Tensor entry by the name that the tensor has in a saved checkpoint.
        model (`PreTrainedModel`): Says which names are tied; may be on the meta device.
        tensors (`dict[str, torch.Tensor]`): The model's tensors by their names in the model. Only the names of the
            tied ones count, and that transformers can rename them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def saved_name(name: str) -> str:
        # The name in the module is not the name in the file for models whose checkpoints transformers converts.
        return next(iter(revert_weight_conversion(model, {name: tensors[name]})))

    entries = dict(entries)
    for tied, kept in model.all_tied_weights_keys.items():
        tied, kept = saved_name(tied), saved_name(kept)
        # transformers ties what its config declares, under whichever of the names is there, unless both are there and
        # differ: then both count.
        if tied in entries and entries.setdefault(kept, entries[tied]) == entries[tied]:
            del entries[tied]

    elements = Counter()
    for entry in entries.values():
        dtype, shape, _ = entry.split(" ")
        elements[dtype] += math.prod(int(size) for size in shape[1:-1].split("x") if size)
    return _Weights(
        digest=blake3("\n".join(f"{name} {entry}" for name, entry in sorted(entries.items())).encode()).hexdigest(),
        dtype=max(elements, key=elements.get, default=None),
        parameters=elements.total(),
        architecture=architecture,
    )


def _adapter_digest(config: dict[str, Any], entries: dict[str, str]) -> str:
    """Digest of an adapter's tensors, and of the part of its config that decides what they do."""
    # An option that PEFT adds later is off by default, and must not change the digest of adapters that lack it.
    config = {key: value for key, value in config.items() if value and key not in ADAPTER_CONFIG_TO_SKIP}
    if "target_parameters" in config:  # a set, which PEFT saves in any order
        config["target_parameters"] = sorted(config["target_parameters"])
    return _json_digest([config, sorted(entries.items())])


def _as_peft_loads(tensor: torch.Tensor) -> torch.Tensor:
    """PEFT loads 16-bit adapters as float32, which holds the same values: so they count as float32."""
    import torch

    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# Weights on disk


def _meta_model(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """A model without memory, which knows what transformers ties, drops and renames."""
    import torch
    import transformers

    # The class that wrote the checkpoint knows what it tied; the auto class stands in for one transformers lacks.
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None)
    with torch.device("meta"):
        if model_class is not None:
            return model_class(config)
        classes = getattr(config, "auto_map", None) or {}
        auto = next(
            (auto for auto, ref in classes.items() if ref == architecture or ref.endswith(f".{architecture}")),
            "AutoModelForCausalLM",
        )
        return getattr(transformers, auto).from_config(config, trust_remote_code=trust_remote_code)


def _saved_weights(directory: Path, trust_remote_code: bool) -> _Weights:
    import transformers

    files = _safetensors_files(directory)
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    model = _meta_model(config, trust_remote_code)
    # What transformers drops on loading is no part of the teacher: a loaded copy does not have it. It drops only what
    # the model has no place for. The second pattern is a buffer of old checkpoints, which it drops for all models.
    dropped = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    names = _names_in_files(model)
    wanted = {name for names_of_one in names.values() for name in names_of_one}

    entries: dict[str, str] = {}
    for of_file in _file_entries(files):
        gone = {key for key in of_file if key not in wanted and any(re.search(x, key) for x in dropped)}
        kept = {key: entry for key, entry in of_file.items() if key not in gone}
        if twice := entries.keys() & kept.keys():
            raise ValueError(f"{directory}: {min(twice)!r} is in more than one safetensors file.")
        entries |= kept
    is_quantized = getattr(config, "quantization_config", None) is not None  # with tensors of other names
    if missing := [] if is_quantized else _missing(entries, model, names):
        raise ValueError(
            f"{directory} is not whole: {len(missing)} weights of {type(model).__name__} are not in its files, such "
            f"as {missing[0]!r}. transformers would draw them at random, differently each time."
        )
    return _summarize(entries, model, model.state_dict(), (config.architectures or [type(model).__name__])[0])


def _names_in_files(model: PreTrainedModel) -> dict[str, list[str]]:
    """The names that each tensor of a model may have in a checkpoint: its own first, then with and without the prefix
    of the base model, which transformers adds and takes off."""
    from transformers.core_model_loading import revert_weight_conversion

    prefix, names = f"{model.base_model_prefix}.", {}
    for name, tensor in model.state_dict().items():
        own = next(iter(revert_weight_conversion(model, {name: tensor})), name)
        names[name] = [own, own.removeprefix(prefix), prefix + own]
    return names


def _missing(entries: dict[str, str], model: PreTrainedModel, names: dict[str, list[str]]) -> list[str]:
    """The parameters that a checkpoint lacks, and that are tied to none in it."""
    there = {name for name, in_files in names.items() if not entries.keys().isdisjoint(in_files)}
    for tied, kept in model.all_tied_weights_keys.items():
        if {tied, kept} & there:
            there |= {tied, kept}
    return sorted(names[name][0] for name, _ in model.named_parameters() if name in names and name not in there)


def _saved_adapter_digest(directory: Path) -> str:
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} holds an adapter without adapter_model.safetensors. Pickled weights (.bin) are never "
            "loaded: re-save the adapter as safetensors with `model.save_pretrained(directory)`."
        )
    config = json.loads((directory / ADAPTER_CONFIG).read_text())
    (entries,) = _file_entries([file], _as_peft_loads)
    return _adapter_digest(config, entries)


def _safetensors_files(directory: Path) -> list[Path]:
    """The weight files that transformers would load, in the order in which it looks for them."""
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


def _file_entries(
    files: list[Path], convert: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> Iterator[dict[str, str]]:
    """Tensor entries by name, of each file in turn, of what `convert` makes of the tensors."""
    from huggingface_hub.utils import tqdm
    from safetensors import SafetensorError, safe_open

    total = sum(file.stat().st_size for file in files)
    # None: shown on a terminal only.
    options = {"unit": "B", "unit_scale": True, "disable": None if total >= PROGRESS_MIN_BYTES else True}
    with tqdm(total=total, desc="Fingerprinting", **options) as bar:
        for file in files:
            entries = {}
            try:
                with safe_open(file, framework="pt") as tensors:
                    # In the order of the file, which is read from front to back.
                    for name in tensors.offset_keys():
                        tensor = tensors.get_tensor(name)
                        entries[name] = _tensor_entry(convert(tensor))
                        bar.update(tensor.nbytes)
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or corrupt ({error}). Download or save it again.") from error
            yield entries


# Weights in memory


def _loaded_weights(model: PreTrainedModel, is_peft_base: bool) -> _Weights:
    from transformers.core_model_loading import revert_weight_conversion

    tensors = _loaded_tensors(model, is_peft_base)
    ignored = set(model._keys_to_ignore_on_save or ())
    saved = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    entries = _tensor_entries(saved, lambda group: revert_weight_conversion(model, group))
    # FSDP2 puts its own class over the model's.
    return _summarize(entries, model, tensors, type(model).__name__.removeprefix("FSDP"))


def _loaded_tensors(model: PreTrainedModel, is_peft_base: bool) -> dict[str, torch.Tensor]:
    """The tensors of a loaded model by their names in it, if they are those of a checkpoint."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model carries an unmerged adapter that transformers attached. Load it with "
            "`peft.PeftModel.from_pretrained(base, adapter)`, or fingerprint the adapter's directory or Hub id."
        )
    advice = "Fingerprint the directory or Hub id that it was loaded from instead."
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(f"The model is quantized: its tensors are not those of its checkpoint. {advice}")
    if getattr(model, "_tp_size", None):
        raise ValueError(f"The model is split by tensor parallelism: this process holds a part of it. {advice}")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(f"The model is not in memory ({name} is on the meta device). {advice}")

    # The parameters themselves, not copies of their data: DeepSpeed marks the ones it partitions.
    tensors = _base_tensors(model) if is_peft_base else model.state_dict(keep_vars=True)
    # torch.compile of a part of the model leaves this component in its names.
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}


def _checkpoints_of(model: PreTrainedModel) -> list[Path]:
    """Where a model may have been loaded from: a directory, or the revisions of its repository in the Hub's cache,
    that of `main` first. A loaded model does not say which revision it is."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = model.config._name_or_path
    if not name or Path(name).is_dir():
        return [Path(name)] if name else []
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    main = cache / "refs" / "main"
    main = main.read_text().strip() if main.is_file() else ""
    return sorted(cache.glob("snapshots/*"), key=lambda path: path.name != main)


def _holds(model: PreTrainedModel, tensors: dict[str, torch.Tensor], directory: Path) -> bool:
    """Whether a model's tensors are those of a checkpoint, cast to the dtypes that they have in the model."""
    import torch
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    try:
        files = _safetensors_files(directory)
    except FileNotFoundError:
        return False
    tied = {
        next(iter(revert_weight_conversion(model, {name: tensors[name]})))
        for name in model.all_tied_weights_keys
        if name in tensors
    }
    ignored = set(model._keys_to_ignore_on_save or ())
    saved = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    if not all(_is_tied(tensors, name, source) for name, source in model.all_tied_weights_keys.items()):
        return False
    not_loaded = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        stored = {name: file for file in opened for name in file.keys()}
        # What the checkpoint has and the model does not, such as the last layers of a model that was cut.
        left_out = {name for name in stored if not any(pattern.search(name) for pattern in not_loaded)} - tied
        for group in _saved_groups(saved, lambda group: revert_weight_conversion(model, group)):
            for name, tensor in group.items():
                left_out.discard(name)
                if name not in stored:
                    if name not in tied:
                        return False
                elif not torch.equal(stored[name].get_tensor(name).to(tensor.dtype), tensor.detach().cpu()):
                    return False
    return not left_out - ignored


def _is_tied(tensors: dict[str, torch.Tensor], name: str, source: str) -> bool:
    """Whether two tensors that a model's config ties are the same, so far as both are there."""
    import torch

    return name not in tensors or source not in tensors or torch.equal(tensors[name], tensors[source])


def _base_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of the model that a `PeftModel` is over, under the names that they have without it."""
    import torch

    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config)).state_dict()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        name = ".".join(part for part in name.split(".") if part not in PEFT_WRAPPERS | {"_orig_mod"})
        if name in plain:
            tensors[name] = tensor
    if missing := plain.keys() - tensors.keys():
        raise ValueError(
            f"{min(missing)} of the base model is not found under the adapter. Fingerprint the adapter's directory or "
            "Hub id instead."
        )
    return tensors


def _tensor_entries(
    tensors: dict[str, torch.Tensor], convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> dict[str, str]:
    """
    Entries of a model's tensors as they are saved, a layer at a time: what is sharded over processes is gathered, and
    what `convert` copies is made, for no more than that. A collective if anything is sharded.
    """
    entries = {}
    for group in _saved_groups(tensors, convert):
        entries |= {name: _tensor_entry(tensor) for name, tensor in group.items()}
        del group  # or this layer would live on while the next one is gathered
    return entries


def _saved_groups(
    tensors: dict[str, torch.Tensor], convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors as they are saved, whole, a layer at a time."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
        # Tensors that transformers merges or splits lie in one layer.
        groups.setdefault(layer[0] if layer else name.rpartition(".")[0], {})[name] = tensor
    for group in groups.values():
        with _gathered(group.values()):
            yield convert({name: _whole(tensor) for name, tensor in group.items()})


def _gathered(tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager:
    """Has the tensors that DeepSpeed ZeRO-3 partitions (marked with `ds_id`) whole in every process."""
    if partitioned := [tensor for tensor in tensors if hasattr(tensor, "ds_id")]:
        import deepspeed

        return deepspeed.zero.GatheredParameters(partitioned)
    return contextlib.nullcontext()


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether processes hold parts of a model's parameters, by DeepSpeed ZeRO-3 or `fully_shard`."""
    from torch.distributed.tensor import DTensor

    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # FSDP2 may keep its shards on the CPU, where the process group need not communicate.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def _has_learnt_nothing(model: Any) -> bool:
    """Whether all adapters of a `PeftModel` are LoRA as it is initialised, with second factors of 0, and train nothing
    beside it."""
    second = [parameter for name, parameter in model.named_parameters() if re.search(r"\blora_(embedding_)?B\b", name)]
    is_lora = all(
        str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
        and not (config.modules_to_save or getattr(config, "trainable_token_indices", None))
        for config in model.peft_config.values()
    )
    return is_lora and bool(second) and not any(_is_nonzero(parameter) for parameter in second)


def _is_nonzero(parameter: torch.Tensor) -> bool:
    with _gathered([parameter]):
        return bool(_whole(parameter).any())


def _active_adapter(model: Any) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"The PeftModel has {len(active)} active adapters ({', '.join(active)}). Choose the teacher's with "
            "`model.set_adapter(name)`, or merge them."
        )
    advice = "Fingerprint the adapter's directory or Hub id instead."
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(f"An adapter is merged into its base's tensors: `model.unmerge_adapter()` first. {advice}")
    for module in model.modules():
        if getattr(module, "disable_adapters", False) is True:
            raise ValueError(
                "The adapters of the PeftModel are disabled, so it computes what its base does. Give the base itself, "
                "or leave `model.disable_adapter()`."
            )
        scale, alpha, rank = (getattr(module, name, None) for name in ("scaling", "lora_alpha", "r"))
        if isinstance(scale, dict) and isinstance(alpha, dict) and isinstance(rank, dict) and active[0] in rank:
            a, r = alpha[active[0]], rank[active[0]]
            if not any(math.isclose(scale[active[0]], a / divisor) for divisor in (r, math.sqrt(r))):
                raise ValueError(
                    f"An adapter is scaled by {scale[active[0]]:.4g}, where its config says {a / r:.4g}. Undo "
                    f"`set_scale`, or save the adapter with that scale. {advice}"
                )
    if getattr(model.peft_config[active[0]], "bias", "none") != "none":
        raise ValueError(f"The adapter trains biases of its base in place, so the base's own are gone. {advice}")
    return active[0]


def _loaded_adapter_digest(model: Any, adapter: str) -> str:
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True), adapter_name=adapter)
    entries = _tensor_entries(tensors, lambda group: {name: _as_peft_loads(tensor) for name, tensor in group.items()})
    # As saved: sets become lists there.
    config = json.loads(json.dumps(model.peft_config[adapter].to_dict(), default=sorted))
    return _adapter_digest(config, entries)
