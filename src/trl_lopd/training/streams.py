"""Tables that are streamed: rows are validated where they are read, and shared out among processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import IterableDataset

from ..errors import TableError
from ..table.schema import REQUIRED_COLUMNS, TOKEN_COLUMNS, validate_rows

Row = dict[str, Any]

# What marks a row that only fills the last batch.
FILLER = "is_filler"


@dataclass
class RowCheck:
    """
    Validates rows of a stream as they arrive, in whichever process reads them: each by itself, and that it has the
    columns and the k of the first row of the stream. A `None` counts as a missing value.

    Args:
        floor (`float` or `None`): `teacher_logprob_floor`.
        vocab (`tuple`): Of [`~table.vocab_limits`].
        columns (`frozenset[str]`): Those of the first row, see [`columns_of`].
        top_k (`int`): Of the first row.
        rows (`int`): How many this process has validated.

    Raises:
        TableError: For the first row that is not valid; rows are counted from 0 in each process.
    """

    floor: float | None
    vocab: tuple[int | None, int | None]
    columns: frozenset[str]
    top_k: int = 0
    rows: int = 0

    def __call__(self, rows: list[Row]) -> None:
        try:
            for i, row in enumerate(rows):
                self._check_columns(row, self.rows + i)
            summary = validate_rows(
                pa.Table.from_pylist([{name: row[name] for name in self.columns} for row in rows]),
                first_row=self.rows,
                vocab_size=self.vocab[0],
                topk_vocab_size=self.vocab[1],
                top_k=self.top_k,
                teacher_logprob_floor=self.floor,
            )
        except TableError as error:
            raise TableError(f"{error} (Rows are counted in the order in which this process read them.)") from None
        self.rows, self.top_k = self.rows + len(rows), summary.top_k

    def _check_columns(self, row: Row, number: int) -> None:
        here = columns_of(row)
        if here == self.columns:
            return
        name = next(name for name in (*REQUIRED_COLUMNS, *TOKEN_COLUMNS) if (name in here) != (name in self.columns))
        problem = "missing, but the first row of the stream has it" if name in self.columns else (
            "there, but the first row of the stream lacks it"
        )  # fmt: skip
        raise TableError(
            f"Row {number}, column `{name}`: {problem}. A column is in every row of a stream or in none: drop it "
            "with `remove_columns`, or score all rows with the same options."
        )


def columns_of(row: Row) -> frozenset[str]:
    """The columns that training reads of which a row has a value."""
    return frozenset(name for name in (*REQUIRED_COLUMNS, *TOKEN_COLUMNS) if row.get(name) is not None)


class WholeStream(torch.utils.data.IterableDataset):
    """
    A stream that every process reads whole, to take its part of each batch.

    Of a [`~datasets.IterableDataset`] with enough shards, accelerate would give each process some: those with fewer
    rows would train on theirs more often, or leave the others waiting at the end of an epoch.

    Args:
        stream ([`~datasets.IterableDataset`]): The rows.
        fill (`int`, *optional*, defaults to `1`): After the last row come as many copies of the first, marked by
            `FILLER`, as make the number of rows a multiple of this. accelerate repeats rows where the last batch is
            too small for all processes, and nothing tells these from the others.
    """

    def __init__(self, stream: IterableDataset, fill: int = 1):
        self.stream, self.fill = stream, fill

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Row]:
        rows = 0
        for rows, row in enumerate(self.stream, start=1):
            if rows == 1:
                first = row
            yield row
        for _ in range(-rows % self.fill):
            yield {**first, FILLER: True}
