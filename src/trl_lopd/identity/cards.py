"""Where identity is written down: one key, `trl_lopd`, in the front matter of model cards and dataset cards.

docs/teacher-consistency.md shows the records of a model, of a table and of SFT data.

A `datasets.Dataset` in memory carries the same record in `info.description`, which `map`, `filter`, `shuffle`,
`concatenate_datasets` and `save_to_disk` keep; parquet files and `push_to_hub` do not, hence `stamp_dataset_card`.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..names import is_missing, refuse_missing
from .fingerprint import EVIDENCE, TeacherFingerprint, content_id, evidence_of, is_id, with_evidence

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

logger = logging.getLogger(__name__)

KEY = "trl_lopd"

# Keys that hold a list of entries, each with an `id`.
_ENTRY_LISTS = ("sft_teachers", "teachers", "students")
# Many times faster where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DESCRIPTION = re.compile(r"```json trl_lopd\n(.*?)\n```\n?", re.DOTALL)

Teacher = TeacherFingerprint | str | dict[str, Any]
# A row's `teacher_fingerprint`, or that with its `teacher_id`.
Signature = str | tuple[str | None, str | None] | None


# ---- Entries ----


def entry(teacher: Teacher, evidence: str | None = None, **more: Any) -> dict[str, Any]:
    """
    What a card says of a teacher or a student: `id`, `evidence`, and what else is known.

    Args:
        teacher ([`TeacherFingerprint`], `str` or `dict`): A fingerprint, recorded in full; an id; or another entry.
        evidence (`str`, *optional*): How it is known: `"verified"`, `"probed"` or `"declared"`. Defaults to what the
            id or the entry says.
        **more: Other keys. Those that are `None` are left out.

    Raises:
        `ValueError`: if the id or the evidence is malformed.
    """
    if isinstance(teacher, TeacherFingerprint):
        record = teacher.to_dict()
    elif isinstance(teacher, dict):
        record = dict(teacher)
    else:
        record = {"id": teacher}
    id = record.pop("id", None)
    if not isinstance(id, str) or not is_id(id):
        raise ValueError(
            f"{id!r} is not the id of a model. It looks like `name@1-0123456789ab-01234567-01234567`: `trl-lopd "
            "fingerprint MODEL` prints it, `fingerprint_teacher` computes it."
        )
    evidence = evidence or record.get("evidence") or evidence_of(id)
    if evidence not in EVIDENCE:
        raise ValueError(f"Unknown evidence {evidence!r}; it is one of {', '.join(EVIDENCE)}.")
    more = {key: value for key, value in more.items() if value is not None}
    return {"id": with_evidence(id, "verified"), **record, "evidence": evidence, **more}


def count_teachers(counts: dict[Signature, int], known: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """
    Entries of teachers with their rows, share and domains, the largest share first.

    Args:
        counts (`dict`): Rows of each value in a `teacher_fingerprint` column, or of each pair of such a value and a
            `teacher_id`, as [`teacher_counts`] gives. As a teacher, `None` and the empty string stand for rows
            without one, which count in the shares only; a value that is no id is taken as a person's word. As a
            `teacher_id`, `None` stands for rows whose domain is not known.
        known (`Iterable[dict]`, *optional*): Entries that say more about some of them. What does not hold for the
            rows that are counted is left out, with a warning where entries contradict each other.
    """
    entries: dict[str, list[dict[str, Any]]] = {}
    for record in known:
        entries.setdefault(content_id(record["id"]), []).append(record)
    rows: Counter[str] = Counter()
    domains: dict[str | None, Counter[str | None]] = {}
    for key, count in counts.items():
        id, domain = key if isinstance(key, tuple) else (key, None)
        rows[content_id(id or "")] += count
        domains.setdefault(id, Counter())[domain] += count
    about = {content: _of_rows(rows[content], records) for content, records in entries.items()}
    total = sum(counts.values())
    return [
        {
            **about.get(content_id(id), {}),
            **(entry(id) if is_id(id) else {"id": id, "evidence": "declared"}),
            **({"rows": of.total(), "share": round(of.total() / total, 4)} if of.total() else {}),
            **(
                {"teacher_ids": known}
                if (known := {name: of[name] or None for name in sorted(of.keys() - {None})})
                else {}
            ),
        }
        for id, of in sorted(domains.items(), key=lambda item: -item[1].total())
        if id
    ]


def signatures(entries: Iterable[dict[str, Any]]) -> Counter[tuple[str, str | None]]:
    """The rows of each teacher and domain that [`count_teachers`] made entries of."""
    counts: Counter[tuple[str, str | None]] = Counter()
    for item in entries:
        id = with_evidence(item["id"], item.get("evidence", "declared")) if is_id(item["id"]) else item["id"]
        known = {name: rows or 0 for name, rows in (item.get("teacher_ids") or {}).items()}
        for name, rows in known.items():
            counts[id, name] += rows
        if (rest := item.get("rows", 0) - sum(known.values())) > 0 or not known:
            counts[id, None] += rest
    return counts


def _of_rows(rows: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What entries of one teacher or student say of these rows, which may be fewer than they were written for."""
    # Domains are counted anew.
    merged = {key: value for record in records for key, value in record.items() if key != "teacher_ids"}
    for key in ("sampling", "scoring"):
        settings = [dict(record[key]) for record in records if key in record]
        cut = [values.pop("truncated_answers", None) for values in settings]
        if any(values != settings[0] for values in settings):
            logger.warning(
                f"The rows of {merged['id']} have several records of `{key}`, of which the card of all has none: "
                f"{' and '.join(json.dumps(values) for values in settings)}."
            )
            del merged[key]
        elif settings:
            merged[key] = settings[0]
            # A count, of all of the answers that were sampled.
            if None not in cut and sum(record.get("rows", 0) for record in records) == rows:
                merged[key]["truncated_answers"] = sum(cut)
    return merged


# ---- Model cards ----


def stamp_model_card(
    model: str | Path,
    *,
    sft_teachers: Teacher | Iterable[Teacher] | None = None,
    evidence: str = "declared",
    sft_rows: int | None = None,
    checkpoint: TeacherFingerprint | None = None,
    opd_rounds: Iterable[dict[str, Any]] | None = None,
    token: str | None = None,
) -> None:
    """
    Write in a model's card which teachers it comes from.

    Only the key `trl_lopd` of the front matter is written: other keys keep their values and their order, and the text
    of the card stays. A card is created if there is none. Stamping twice with the same teachers writes the same bytes.

    Args:
        model (`str` or `Path`): Directory of the checkpoint, or a Hub id, whose card is then changed on the Hub.
        sft_teachers (*optional*): Teachers that wrote its SFT data: fingerprints, recorded in full; ids; or entries of
            another card, which keep their evidence. Replaces the recorded list; `None` leaves it.
        evidence (`str`, *optional*, defaults to `"declared"`): How the fingerprints and ids given are known to have
            written the data. `"verified"` is for those read from the data itself, as `TeacherStampCallback` does.
        sft_rows (`int`, *optional*): How many SFT rows there were, those without a named teacher too. Not known if
            teachers are given without it.
        checkpoint ([`TeacherFingerprint`], *optional*): Of this checkpoint: the claims then hold for these weights
            only, and a copy of the card beside other weights is found out.
        opd_rounds (`Iterable[dict]`, *optional*): Rounds of offline OPD, oldest first. Replaces the recorded list.
        token (`str`, *optional*): For writing to the Hub.

    Raises:
        `ValueError`: if there is nothing to stamp, if an id is malformed, or if the card's front matter or record is
            malformed.
    """
    changes: dict[str, Any] = {}
    if checkpoint is not None:
        changes["model"] = entry(checkpoint, "verified")
    if sft_teachers is not None:
        given = [sft_teachers] if isinstance(sft_teachers, str | dict | TeacherFingerprint) else sft_teachers
        changes["sft_teachers"] = [entry(t, None if isinstance(t, dict) else evidence) for t in given]
        changes["sft_rows"] = sft_rows
    if opd_rounds is not None:
        changes["opd_rounds"] = list(opd_rounds)
    if not changes:
        raise ValueError("Nothing to stamp: give sft_teachers, checkpoint or opd_rounds.")
    _write(model, changes, "model", token)


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
    return _read(model, revision, "model")


# ---- Dataset cards ----


def stamp_dataset_card(
    table: str | Path, dataset: Dataset | DatasetDict | dict[str, Dataset], *, token: str | None = None
) -> None:
    """
    Write in a dataset's card what its rows are: who sampled and who scored them, how many, and their digest.

    Parquet files and `push_to_hub` keep the columns but not the record that sampling and scoring attach to a
    `Dataset`; this puts it beside them. The rest of the card stays.

    ```python
    table.push_to_hub("my-org/scored-rollouts")
    stamp_dataset_card("my-org/scored-rollouts", table)
    ```

    Digests are written only for rows that are still what was scored: the whole table, or all parts of a split of it;
    otherwise a warning says so.

    Args:
        table (`str` or `Path`): Directory or Hub id of the dataset.
        dataset ([`~datasets.Dataset`] or `dict` of splits): What was written there.
        token (`str`, *optional*): For writing to the Hub.

    Raises:
        `ValueError`: if the card's front matter or record is malformed.
    """
    from ..table.schema import refuse_no_dataset

    splits = dict(dataset) if isinstance(dataset, dict) else {None: dataset}
    for part in splits.values():
        refuse_no_dataset(part, "dataset")
    record = _dataset_record(splits)
    if "teachers" in record and "digests" not in record:
        logger.warning(
            "The card of %s gets no digest of its rows: they are not, or not all, what `score_rollouts` gave.", table
        )
    write_record(table, record, token)


def write_record(table: str | Path, record: dict[str, Any], token: str | None = None) -> None:
    """Put a record in the place of that in a dataset's card; see [`stamp_dataset_card`]."""
    stale = dict.fromkeys(("students", "teachers", "sft_teachers", "columns", "digests", "residual"))
    _write(table, {**stale, **record}, "dataset", token)


def read_dataset_card(table: str | Path, revision: str | None = None) -> dict[str, Any]:
    """
    The `trl_lopd` record of a dataset card; `{}` if there is no card, or no such key in it.

    Args:
        table (`str` or `Path`): Local directory or Hub dataset id.
        revision (`str`, *optional*): Hub revision. Ignored for a local directory.

    Raises:
        `ValueError`: if the front matter or the record is malformed; the message says where.
    """
    return _read(table, revision, "dataset")


def load_rows(name: str, *args: Any, **kwargs: Any) -> Any:
    """
    `datasets.load_dataset(*args, **kwargs)`, whose errors say what could not be read, and why.

    Raises:
        `ValueError`: if it is empty, damaged, or of another format, or if there is no such split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(*args, **kwargs)
    except StopIteration:  # from a JSON file
        raise ValueError(f"{name} has no rows.") from None
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error


def load_table(
    name: str | Path,
    config: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset | DatasetDict | IterableDataset:
    """
    A table with the record of its card: `load_dataset` for the Hub, a directory and a parquet file, `load_from_disk`
    for what `save_to_disk` wrote.

    Rows loaded without it are as good; the record adds the integrity of the rows and what differs in words.

    Args:
        name (`str` or `Path`): Hub id, directory or parquet file.
        config (`str`, *optional*): Configuration of a Hub dataset, or of a directory whose card has some.
        split (`str`, *optional*): Which split; all of them in a `dict` if not given and there are several.
        revision (`str`, *optional*): Hub revision.
        streaming (`bool`, *optional*, defaults to `False`): Whether to stream the rows.

    Raises:
        `ValueError`: if the card is malformed, if what `save_to_disk` wrote is to be streamed, if there is no such
            split, or if a `config` or `revision` is given that a local table does not have.
        `ShardError`: if sampling or scoring into the directory has not been completed, or a shard is not whole.
        `FileNotFoundError`: if a path is not there.
    """
    from datasets import NamedSplit, load_from_disk

    from ..table.store import check_complete, shards_of

    path, name = Path(name), str(name)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name} is no table: a table is a directory, a parquet file, or a dataset on the Hub.")
    refuse_missing(name)
    if path.is_dir():
        check_complete(path)
        if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{name} is a model, where a table or prompts are needed.")
    if revision is not None and path.exists():
        raise ValueError(f"`revision` is for a dataset on the Hub; {name} is local.")
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    files = [name] if path.suffix == ".parquet" else shards_of(path)
    if config is not None and (is_saved or files):
        raise ValueError(f"{name} has no configurations: `config` is {config!r}.")
    directory = path.parent if path.suffix == ".parquet" else name
    # `datasets` reads a local card too, and does not say which file it cannot read.
    record = read_dataset_card(directory) if path.exists() else None
    if is_saved:
        if streaming:
            raise ValueError(f"{name} was written by `save_to_disk`, which cannot be streamed; it is memory-mapped.")
        table = load_from_disk(name)
        # A table without the name of a split counts as "train", as a file does.
        splits = table if isinstance(table, dict) else {str(table.split or "train"): table}
        if split is not None:
            if split not in splits:
                raise ValueError(f"{name} has no split {split!r}, only {', '.join(map(repr, splits))}.")
            table = splits[split]
    elif files:
        table = load_rows(name, "parquet", data_files={"train": files}, split=split or "train", streaming=streaming)
    else:
        table = load_rows(name, name, config, split=split, revision=revision, streaming=streaming)
    if isinstance(table, dict) and len(table) == 1:
        ((only, table),) = table.items()
        if table.split is None:  # `load_from_disk` leaves it out, and it would count as "train"
            table._split = NamedSplit(only)
    if record is None:
        record = read_dataset_card(directory, revision)
    if not record:
        return table
    parts = table.values() if isinstance(table, dict) else [table]
    for part in parts:
        if not record_of(part):
            attach_record(part, record)
    return table


def record_of(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """
    The record that a `Dataset` in memory carries; `{}` if it carries none. Tables that were concatenated have theirs
    joined.
    """
    records = [json.loads(text) for text in _DESCRIPTION.findall(dataset.info.description or "")]
    if len(records) < 2:
        return records[0] if records else {}
    joined: dict[str, Any] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, int):
                joined[key] = joined.get(key, 0) + value
            elif key == "columns":
                joined[key] = [name for name in joined.get(key, value) if name in value]
            else:
                joined.setdefault(key, []).extend(value)
    # Digests add up only if all cover the same columns.
    if len({tuple(record.get("columns", ())) for record in records}) > 1:
        joined.pop("digests", None)
    return joined


def attach_record(dataset: Dataset | IterableDataset, record: dict[str, Any]) -> None:
    """Makes a dataset carry this record, in place of the one that it carries."""
    text = _DESCRIPTION.sub("", dataset.info.description or "")
    dataset.info.description = f"{text}```json {KEY}\n{json.dumps(record)}\n```\n"


def _dataset_record(splits: dict[str | None, Dataset]) -> dict[str, Any]:
    """What the card of a dataset with these splits says."""
    from ..table.schema import add_digests, column_counts, lengths, rows_digest, score_column, teacher_counts

    records = [record_of(part) for part in splits.values()]
    # The parts of one table all carry its record; parts of several tables carry theirs.
    known = {json.dumps(record, sort_keys=True): record for record in records}.values()
    result: dict[str, Any] = {}
    # Who signed rows without scores wrote them.
    scored = all(score_column(part.column_names) for part in splits.values())
    signed = {"students": "student_fingerprint", "teachers" if scored else "sft_teachers": "teacher_fingerprint"}
    for key, column in signed.items():
        counts: Counter[Signature] = Counter()
        for part in splits.values():
            counts += column_counts(part, column) if key == "students" else teacher_counts(part)
        entries = [item for record in known for item in record.get(key, ())]
        if counted := count_teachers(counts, entries):
            result[key] = counted
    result["rows"] = sum(len(part) for part in splits.values())
    if all("completion_ids" in part.column_names for part in splits.values()):
        result["completion_tokens"] = int(sum(lengths(part)[1].sum() for part in splits.values()))
    if fits := [fit for record in known for fit in record.get("residual", ())]:
        result["residual"] = fits
    columns = next((record["columns"] for record in known if record.get("digests")), None)
    if columns and all(set(columns) <= set(part.column_names) for part in splits.values()):
        digests = [rows_digest(part, columns) for part in splits.values()]
        recorded = [item["digest"] for record in known for item in record.get("digests", ())]
        if add_digests(digests) == add_digests(recorded) or set(digests) <= set(recorded):
            result["columns"] = columns
            result["digests"] = [
                {**({"split": split} if split else {}), "rows": len(part), "digest": digest}
                for (split, part), digest in zip(splits.items(), digests, strict=True)
            ]
    return result


# ---- Reading and writing ----


def _read(repo: str | Path, revision: str | None, repo_type: str) -> dict[str, Any]:
    if Path(repo).is_dir():
        path = Path(repo) / constants.REPOCARD_NAME
        if not path.is_file():
            return {}
    elif is_missing(str(repo)):
        logger.warning("No %s card could be read for %s: %s", repo_type, repo, "it is not there")
        return {}
    else:
        # `ModelCard.load` takes no revision.
        try:
            path = Path(hf_hub_download(str(repo), constants.REPOCARD_NAME, repo_type=repo_type, revision=revision))
        except RemoteEntryNotFoundError:
            return {}
        except (LocalEntryNotFoundError, RepositoryNotFoundError, OfflineModeIsEnabled) as error:
            logger.warning("No %s card could be read for %s: %s", repo_type, repo, error)
            return {}
    return _validated(_parts(_text_of(path), path)[0].get(KEY), path)


def _write(repo: str | Path, changes: dict[str, Any], repo_type: str, token: str | None) -> None:
    from ..table.store import write_text

    name, directory = constants.REPOCARD_NAME, Path(repo)
    if directory.is_dir():
        path = directory / name
        text = _text_of(path) if path.is_file() else None
        write_text(path, _stamped(text, changes, path))
        return
    if directory.is_absolute() or str(repo).startswith("."):
        raise FileNotFoundError(f"{repo} is not a directory.")
    try:
        text = _text_of(Path(hf_hub_download(str(repo), name, repo_type=repo_type, token=token)))
    except RemoteEntryNotFoundError:
        text = None
    HfApi().upload_file(
        path_or_fileobj=_stamped(text, changes, directory / name).encode(),
        path_in_repo=name,
        repo_id=str(repo),
        repo_type=repo_type,
        token=token,
        commit_message="Record teachers in the card",
    )


def _text_of(path: Path) -> str:
    try:
        # Not as a text file, which would change the ends of lines.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None


def _validated(record: Any, path: Path) -> dict[str, Any]:
    def check(where: str, value: Any, kind: type, what: str) -> None:
        if not isinstance(value, kind):
            raise ValueError(f"{path}: {where} must be {what}, not {value!r}.")

    if record is None:
        return {}
    check(KEY, record, dict, "a mapping")
    entries = [(f"{KEY}.model", record["model"])] if record.get("model") is not None else []
    for key in (*_ENTRY_LISTS, "opd_rounds", "residual"):
        items = record.get(key) or []
        check(f"{KEY}.{key}", items, list, "a list")
        named = [(f"{KEY}.{key}[{i}]", item) for i, item in enumerate(items)]
        for where, item in named:
            check(where, item, dict, "a mapping")
        entries += named if key in _ENTRY_LISTS else []
    for where, item in [(KEY, record), *entries]:
        check(where, item, dict, "a mapping")
        check(f"{where}.probes", item.get("probes", {}), dict, "a mapping")
        check(f"{where}.teacher_ids", item.get("teacher_ids", {}), dict, "a mapping")
        for name, rows in item.get("teacher_ids", {}).items():
            check(f"{where}.teacher_ids", name, str, "a mapping of texts")
            check(f"{where}.teacher_ids.{name}", 0 if rows is None else rows, int, "a whole number, or null")
        for key in ("rows", "sft_rows"):
            check(f"{where}.{key}", item.get(key, 0), int, "a whole number")
    for where, item in entries:
        try:
            entry(item)
        except ValueError as error:
            raise ValueError(f"{path}: {where}: {error}") from None
    return record


def _parts(text: str, path: Path) -> tuple[dict[str, Any], str]:
    """The metadata of a card, and the text behind them."""
    match = REGEX_YAML_BLOCK.match(text)
    if match is None:
        return {}, text
    try:
        metadata = yaml.load(match[2], Loader=_LOADER) or {}
        if not isinstance(metadata, dict):
            raise ValueError(f"it must be a mapping, not {metadata!r:.80}")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the front matter cannot be read: {' '.join(str(error).split())}") from error
    return metadata, text[match.end() :]


def _stamped(text: str | None, changes: dict[str, Any], path: Path) -> str:
    """The card `text`, or a new one, with `changes` in its `trl_lopd` record."""
    text = f"\n# {path.parent.absolute().name}\n" if text is None else text
    newline = "\r\n" if text.lstrip().startswith("---\r\n") else "\n"
    metadata, text = _parts(text, path)
    record = {**_validated(metadata.get(KEY), path), **changes}
    metadata[KEY] = {key: value for key, value in record.items() if value is not None}
    # Wide, so that a long name stays on one line.
    front = yaml.dump(metadata, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000, line_break=newline)
    return f"---{newline}{front}---{newline}{text}"


class _Dumper(yaml.SafeDumper):
    """Numbers in one line, and no anchors: the same list in two places is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        numbers = all(isinstance(item, int | float) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=numbers and bool(sequence) or flow_style)
