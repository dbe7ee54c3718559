"""Several teachers of one table: whose each row is, a run for each of them, and all rows in their order again.

Each teacher scores its rows, or answers its prompts, in an ordinary run, one teacher after the other, so that no two
have to be in memory. On disk the parts are stores in `.trl_lopd/parts` of the whole one, which is locked meanwhile;
its shards are written when all parts are complete, and the parts are deleted when its card is written, too.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..errors import TableError
from ..identity.cards import attach_record, read_dataset_card, write_record
from ..processes import on_main_process, processes, wait_for_everyone
from ..table.schema import TEACHER_ID, batches, holds_names, lengths
from ..table.store import HIDDEN
from .runs import ShardedRun, take

# In the parts: the number of the input row that a row came of.
_ROW = "trl_lopd_row"


def split_rows(dataset: Dataset, teachers: dict[str, Any], column: str | None) -> tuple[Dataset, dict[str, Dataset]]:
    """
    Finds each teacher's rows.

    Args:
        dataset ([`~datasets.Dataset`]): The rows.
        teachers (`dict[str, Any]`): The teachers by name.
        column (`str`, *optional*): Column with the name of each row's teacher. Defaults to `"teacher_id"`.

    Returns:
        `tuple[Dataset, dict[str, Dataset]]`: The rows, with a column `teacher_id`; and those of each teacher.

    Raises:
        TableError: If a row names no teacher, or none of these, or a teacher has no rows.
        ValueError: If there are no teachers, or a name is no text.
    """
    column = column or TEACHER_ID
    if not teachers or not all(isinstance(name, str) and name for name in teachers):
        raise ValueError(f"Several teachers are given by their names, which are texts, not by {list(teachers)}.")
    if not holds_names(dataset, column):
        found = f"holds {dataset.features[column]}" if column in dataset.column_names else "is not there"
        raise TableError(
            f"The column {column!r} {found}. With several teachers it has the name of each row's teacher: "
            f"{_listed(teachers)}. `teacher_column` names another column."
        )
    names = np.array(dataset[column][:], dtype=object)
    for row in np.flatnonzero([name not in teachers for name in names])[:1]:
        value = "null" if names[row] is None else f"{names[row]!r}, which is none of the teachers"
        raise TableError(
            f"Row {row}, column {column!r} is {value}. It is the name of the row's teacher, one of "
            f"{_listed(teachers)}. Give that teacher too, correct the name, or drop the row."
        )
    if idle := [name for name in teachers if name not in names]:
        raise TableError(f"The teacher {idle[0]!r} has no rows: no {column!r} is {idle[0]!r}. Leave it out.")
    if column != TEACHER_ID:
        if TEACHER_ID in dataset.column_names:
            raise TableError(
                f"The rows have a column {TEACHER_ID!r} beside {column!r}, whose names would be written to it. Remove "
                "or rename it."
            )
        dataset = dataset.add_column(TEACHER_ID, names.tolist(), feature=dataset.features[column])
    numbered = dataset.add_column(_ROW, np.arange(len(dataset)))
    return dataset, {name: numbered.select(np.flatnonzero(names == name)) for name in teachers}


def refuse_list(model: Any, name: str) -> None:
    """
    Raises:
        TypeError: If several models are given without names.
    """
    if isinstance(model, list | tuple):
        raise TypeError(
            f"`{name}` is one model, or a dictionary of several, {{'math': ..., 'code': ...}}, whose names are in the "
            f"column `{TEACHER_ID}` of the rows; not a {type(model).__name__}."
        )


def of_each(teachers: dict[str, Any], **options: Any) -> dict[str, dict[str, Any]]:
    """
    The options of each teacher, of options that are given by the teachers' names.

    Raises:
        ValueError: If an option is not, or has a name that no teacher has.
    """
    for option, values in options.items():
        if values is not None and not (isinstance(values, dict) and values.keys() <= teachers.keys()):
            raise ValueError(
                f"With several teachers, `{option}` is a dictionary with what is meant for each, of "
                f"{_listed(teachers)}, as `teacher` is; not {values!r:.80}."
            )
    return {name: {option: (values or {}).get(name) for option, values in options.items()} for name in teachers}


@contextmanager
def naming(teacher: str, part: Path | None = None, whole: str | Path | None = None) -> Iterator[None]:
    """Names a teacher in the errors inside a `with` block, and the directory of the whole, which the user gave, in
    place of that of its part."""
    try:
        yield
    except Exception as error:
        if len(error.args) == 1 and isinstance(message := error.args[0], str):
            if part is not None:
                message = re.sub(rf"{re.escape(str(part))}(?!/)", lambda _: str(whole), message)
            error.args = (f"Teacher {teacher!r}: {message}",)
        raise


def row_numbers(dataset: Dataset) -> np.ndarray:
    """The numbers of rows in the whole input, of which they may be a part: `(rows,)` int."""
    if _ROW not in dataset.column_names:
        return np.arange(len(dataset))
    return np.concatenate(
        [np.empty(0, np.int64), *(batch[_ROW].to_numpy() for batch in batches(dataset, [_ROW], 10_000))]
    )


def run_parts(
    run: ShardedRun,
    parts: dict[str, tuple[Dataset, Any]],
    compute: Callable[[Dataset, Any, Path | None, ShardedRun], tuple[Dataset, dict[str, Any], dict[str, int]]],
    key: str,
) -> list[dict[str, Any]]:
    """
    Computes what is missing of the parts, and of the whole.

    Args:
        run ([`ShardedRun`]): The run of the whole, entered.
        parts (`dict[str, tuple[Dataset, Any]]`): The input rows of each teacher, and what computes their output.
        compute (`Callable`): Makes of both, a directory and the run of the whole the output rows, the teacher's entry
            for the card, and the counts of its run.
        key (`str`): Key of the entries in a card.

    Returns:
        `list[dict]`: The entries; those in the card of a table that is finished already.
    """
    directory = _directory(run)
    wait_for_everyone(run.state)
    if on_main_process(run.state, lambda: run.is_complete and not directory.exists()):
        card = on_main_process(run.state, lambda: read_dataset_card(run.output_dir))
        return [*(card.get("teachers") or ()), *(card.get("sft_teachers") or ())]
    # What was done before is counted by the parts.
    run.before = Counter()
    if run.bar.n:
        run.bar.reset()
    tables, entries, counts = [], [], Counter()
    for name, (rows, worker) in parts.items():
        path = directory and directory / f"teacher-{quote(name, safe='')}"
        with naming(name, path, run.output_dir):
            table, entry, of_part = compute(rows, worker, path, run)
        if path is not None and run.state.is_main_process:
            write_record(path, {key: [entry]})
        tables.append(table)
        entries.append(entry)
        counts.update(of_part)
    numbers = [row_numbers(table) for table in tables]
    for shard, span in run.pending():
        taken = [
            take(table, range(*np.searchsorted(rows, (span.start, span.stop))))
            for table, rows in zip(tables, numbers, strict=True)
        ]
        joined = concatenate_datasets(taken)
        in_order = take(joined, np.argsort(row_numbers(joined), kind="stable"))
        # The counts of all parts are known of the whole only: the first shard has them.
        run.write(shard, in_order.remove_columns(_ROW), **{key: n * (shard == 0) for key, n in counts.items()})
    return entries


def recorded(table: Dataset, entries: dict[str, Any], output_dir: str | Path | None, **more: Any) -> Dataset:
    """Adds a record of the whole, and of who made it, to rows and to the card of their directory. All processes must
    call this."""
    tokens = int(lengths(table)[1].sum())
    record = {**entries, "rows": len(table), "completion_tokens": tokens, **more}
    attach_record(table, record)
    state = processes()
    if output_dir is not None and state.is_main_process:
        write_record(output_dir, record)
    wait_for_everyone(state)
    return table


def remove_parts(run: ShardedRun) -> None:
    """Deletes the parts of a whole that is complete, with its card. All processes must call this."""
    directory = _directory(run)
    wait_for_everyone(run.state)
    if directory is not None and run.state.is_main_process:
        # In one step they are no longer there, wherever the deletion is interrupted.
        deleted = directory.with_name("parts-deleted")
        shutil.rmtree(deleted, ignore_errors=True)
        if directory.exists():
            directory.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)
    wait_for_everyone(run.state)


def _directory(run: ShardedRun) -> Path | None:
    return None if run.output_dir is None else Path(run.output_dir, HIDDEN, "parts")


def _listed(teachers: dict[str, Any]) -> str:
    return ", ".join(map(repr, teachers))
