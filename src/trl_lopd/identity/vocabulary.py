"""Whether two tokenizers mean the same by the token ids that rows hold.

Teacher and student read the same ids, so an id has to be the same text to both. Their tokenizers may differ in all
else: in added tokens that no row uses, in which of their tokens are special, in how they split text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..models import load_tokenizer
from ..table.schema import batches
from .fingerprint import tokenizer_digest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Ids that a message names.
_SHOWN = 3
# The byte that each character of a byte-level token stands for.
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def distinct_ids(dataset: Dataset) -> np.ndarray:
    """The token ids that prompts and completions hold, each once, ascending."""
    found = np.empty(0, np.int64)
    names = ["prompt_ids", "completion_ids"]
    for batch in batches(dataset, names, 1000):
        parts = [pc.unique(batch[name].combine_chunks().flatten()).to_numpy(zero_copy_only=False) for name in names]
        found = np.union1d(found, np.concatenate(parts))
    return found


def different_tokens(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, ids: Iterable[int]
) -> dict[int, tuple[str, str]]:
    """
    The ids that are not the same token to both, and what each makes of them.

    Kinds of tokenizers write a token in ways of their own, so tokens that are written differently are compared by the
    bytes that they stand for, or by the text of the token after itself, in which a leading space shows.
    """
    ids = [int(id) for id in ids]
    tokens = zip(first.convert_ids_to_tokens(ids), second.convert_ids_to_tokens(ids), strict=True)
    different = {}
    for id, (a, b) in zip(ids, tokens, strict=True):
        if a == b or (_bytes_of(a) is not None and _bytes_of(a) == _bytes_of(b)):
            continue
        # Some kinds drop the space before the first word.
        texts = [tokenizer.decode([id, id]).lstrip() for tokenizer in (first, second)]
        # A part of a character decodes to the sign for what cannot be decoded, whichever part it is.
        if texts[0] != texts[1] or "\ufffd" in texts[0]:
            alone = first.decode([id]), second.decode([id])
            different[id] = alone if alone[0] != alone[1] else (str(a), str(b))
    return different


def _bytes_of(token: str | None) -> bytes | None:
    """The bytes of a token as byte-level and byte-fallback tokenizers write them; `None` for other tokens."""
    if token is None:
        return None
    if match := re.fullmatch("<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(match[1])
    values = [_BYTES.get(character) for character in token]
    return bytes(values) if values and None not in values else None


def say(differences: Mapping[int, tuple[str, str]], first: str, second: str) -> str:
    """A few of [`different_tokens`] in words."""
    some = [f"id {id} is {a!r} to {first} and {b!r} to {second}" for id, (a, b) in list(differences.items())[:_SHOWN]]
    rest = f", and {len(differences) - _SHOWN} more ids differ" if len(differences) > _SHOWN else ""
    return f"{'; '.join(some)}{rest}"


def tokenizer_of(entry: dict[str, Any], beside: str | Path = ".") -> tuple[PreTrainedTokenizerBase, str] | None:
    """
    The tokenizer of a model in a card, and where it was found; `None` if it is not found or not what the card says.

    A name proves nothing, so its content has to have the digest that the card gives.

    Args:
        entry (`dict`): Of a teacher or a student, with `model_id` and `tokenizer`.
        beside (`str` or `Path`, *optional*): A directory next to which models may lie.
    """
    name, digest = str(entry.get("model_id") or ""), entry.get("tokenizer")
    if not (name and digest):
        return None
    local = next((str(path) for path in (Path(name), Path(beside).parent / name) if path.is_dir()), None)
    # What an id of the Hub looks like: a bare name would be looked up among strangers' models.
    if local is None and name.count("/") != 1:
        return None
    revision = None if local or not entry.get("revision") else str(entry["revision"])
    # Whatever a damaged or unreachable model raises: the caller does without.
    try:
        tokenizer = load_tokenizer(local or name, revision=revision, trust_remote_code=False)
        return (tokenizer, local or name) if tokenizer_digest(tokenizer) == digest else None
    except Exception:
        return None


def contradicting_text(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """
    What a tokenizer makes of a completion that is not its text in the row, in words; `None` if it is the same text in
    enough rows to see every id.

    Spaces and special tokens are not compared: tokenizers differ in those without meaning others.

    Args:
        dataset ([`~datasets.Dataset`]): Rollouts with a `completion`, the text, or a list with one message.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The one to read with.
    """
    special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)

    def bare(text: str) -> str:
        for token in special:
            text = text.replace(token, "")
        return "".join(text.split())

    seen: set[int] = set()
    for start in range(0, len(dataset), 1000):
        batch = dataset[start : start + 1000]
        for row, (ids, text) in enumerate(zip(batch["completion_ids"], batch["completion"], strict=True), start):
            if seen.issuperset(ids):
                continue
            seen.update(ids)
            text = text[-1]["content"] if isinstance(text, list) else text
            if text is None or bare(tokenizer.decode(ids)) == bare(text):
                continue
            # The first token that the text does not go on with.
            read = (bare(tokenizer.decode(ids[: token + 1])) for token in range(len(ids)))
            token = next((i for i, begun in enumerate(read) if not bare(text).startswith(begun)), len(ids) - 1)
            return (
                f"row {row}, completion token {token}: id {ids[token]} is {tokenizer.decode([ids[token]])!r} to the "
                f"teacher, but the text that was sampled is {text[:200]!r}"
            )
    return None
