"""Where a teacher's identity is written down: one key, `trl_lopd`, in the front matter of a model card.

```yaml
trl_lopd:
  sft_teachers:   # wrote the SFT data of this checkpoint
  - id: name@digest
    name: ...
    weights: ...
    tokenizer: ...
    chat_template: ...
  opd_teachers:   # scored the rollouts that trained it
  - id: name@digest
```
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .fingerprint import TeacherFingerprint, content_id

logger = logging.getLogger(__name__)

KEY = "trl_lopd"


def stamp_model_card(
    model_dir: str | Path,
    *,
    sft_teachers: Iterable[TeacherFingerprint | str | dict[str, Any]] | None = None,
    opd_teachers: Iterable[TeacherFingerprint | str | dict[str, Any]] | None = None,
) -> None:
    """
    Write in a checkpoint's `README.md` which teachers it comes from.

    Only the `trl_lopd` block of the front matter is written: every other byte of the card stays. A card is created if
    there is none. Stamping twice with the same teachers writes the same bytes.

    Args:
        model_dir (`str` or `Path`): Directory of the checkpoint.
        sft_teachers (`Iterable`, *optional*): Teachers that wrote its SFT data: fingerprints, recorded in full; ids
            (`name@digest`) or records read from another card, as they are. Replaces the recorded list; `None` leaves
            it.
        opd_teachers (`Iterable`, *optional*): Teachers whose scores trained it, likewise.

    Raises:
        `ValueError`: if both lists are `None`, if an id is malformed, if the card's record is malformed, or if its
            front matter cannot be edited without touching more than the block.
        `FileNotFoundError`: if `model_dir` is not a directory.
    """
    given = {"sft_teachers": sft_teachers, "opd_teachers": opd_teachers}
    lists = {key: _records(teachers) for key, teachers in given.items() if teachers is not None}
    if not lists:
        raise ValueError("Nothing to stamp: give sft_teachers, opd_teachers or both.")
    if not Path(model_dir).is_dir():
        raise FileNotFoundError(f"{model_dir} is not a directory.")

    path = Path(model_dir) / constants.REPOCARD_NAME
    text = path.read_bytes().decode() if path.is_file() else f"---\n---\n\n# {Path(model_dir).resolve().name}\n"
    path.write_bytes(_stamped(text, lists, path).encode())


def read_model_card(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """
    The `trl_lopd` record of a model card; `{}` if there is no card, or no such key in it.

    A card that is out of reach (no such repository, no network, offline) counts as no card, with a warning in the log.

    Args:
        model (`str` or `Path`): Local directory or Hub model id.
        revision (`str`, *optional*): Hub revision. Ignored for a local directory.

    Raises:
        `ValueError`: if the front matter or the record is malformed; the message says where.
    """
    if Path(model).is_dir():
        path = Path(model) / constants.REPOCARD_NAME
        if not path.is_file():
            return {}
    else:
        # `ModelCard.load` takes no revision.
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(str(model), constants.REPOCARD_NAME, revision=revision))
        except (EntryNotFoundError, RepositoryNotFoundError, OfflineModeIsEnabled) as error:
            logger.warning("No model card could be read for %s: %s", model, error)
            return {}
    try:
        # Other people's metadata (a malformed model-index, say) is none of our business.
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the front matter cannot be read: {error}") from error
    return _validated(card.data.to_dict().get(KEY), path)


def _records(teachers: Iterable[TeacherFingerprint | str | dict[str, Any]]) -> list[dict[str, str]]:
    if isinstance(teachers, str | TeacherFingerprint):
        teachers = [teachers]
    records = []
    for teacher in teachers:
        if isinstance(teacher, str) and ("@" not in teacher or not content_id(teacher)):
            raise ValueError(f"{teacher!r} is not a teacher's id: it is `name@digest`, see `fingerprint_teacher`.")
        if isinstance(teacher, TeacherFingerprint):
            teacher = teacher.to_dict()
        records.append({"id": teacher} if isinstance(teacher, str) else teacher)
    return records


def _validated(record: Any, path: Path) -> dict[str, Any]:
    if record is None:
        return {}
    if not isinstance(record, dict):
        raise ValueError(f"{path}: {KEY} must be a mapping, not {record!r}.")
    for key in ("sft_teachers", "opd_teachers"):
        teachers = record.get(key) or []
        if not isinstance(teachers, list):
            raise ValueError(f"{path}: {KEY}.{key} must be a list, not {teachers!r}.")
        for i, teacher in enumerate(teachers):
            teacher_id = teacher.get("id") if isinstance(teacher, dict) else None
            if not isinstance(teacher_id, str) or not content_id(teacher_id):
                raise ValueError(f"{path}: {KEY}.{key}[{i}] must be a mapping with an `id`, not {teacher!r}.")
    return record


def _stamped(text: str, lists: dict[str, list[dict[str, str]]], path: Path) -> str:
    """The card `text` with `lists` in its `trl_lopd` block."""
    # A byte order mark is no part of the front matter, and hides it from the pattern.
    bom, text = text[: text.startswith("\ufeff")], text.removeprefix("\ufeff")
    newline = "\r\n" if text.lstrip().partition("\n")[0].endswith("\r") else "\n"
    if match := REGEX_YAML_BLOCK.match(text):
        end = text.index("---", match.start(3))
        opening, front, rest = match[1], text[match.end(1) : end], text[end:]
    elif text.startswith(empty := f"---{newline}---"):
        # The pattern wants a line between the two marks.
        opening, front, rest = f"---{newline}", "", text[len(empty) - 3 :]
    else:
        opening, front, rest = f"---{newline}", "", f"---{newline}{text}"

    try:
        root = yaml.compose(front, Loader=yaml.SafeLoader)
        before = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: the front matter cannot be read: {error}") from error
    if not isinstance(before, dict):
        raise ValueError(f"{path}: the front matter must be a mapping.")
    record = {**_validated(before.get(KEY), path), **lists}
    # Wide, so that a long name stays on one line.
    block = yaml.safe_dump({KEY: record}, sort_keys=False, allow_unicode=True, width=1000, line_break=newline)
    start, end = _block_span(front, root)
    edited = front[:start] + block + front[end:]

    # YAML offers more ways to write a mapping than text surgery knows: never save what does not read back as meant.
    try:
        after = yaml.safe_load(edited)
    except yaml.YAMLError:
        after = {}
    # Compared as text because a metric may be NaN.
    others = [repr({key: value for key, value in data.items() if key != KEY}) for data in (before, after)]
    if after.get(KEY) != record or others[0] != others[1]:
        raise ValueError(f"{path}: cannot edit this front matter in place. Write this block into it by hand:\n{block}")
    return f"{bom}{opening}{edited}{rest}"


def _block_span(front: str, root: yaml.Node | None) -> tuple[int, int]:
    """Start and end of our block in the front matter, in characters; where it goes if it is not there."""
    for key, value in root.value if root else ():
        if key.value == KEY:
            start, end = key.start_mark.index, value.end_mark.index
            if value.end_mark.column:
                # A value on one line ends before its line does.
                end += len(front[end:].splitlines(keepends=True)[0])
            # The parser counts blank lines and comments before the next key as ours; they are the next key's.
            lines = front[start:end].splitlines(keepends=True)
            while lines[-1].lstrip()[:1] in ("", "#"):
                end -= len(lines.pop())
            return start, end
    return len(front), len(front)
