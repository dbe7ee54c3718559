"""The collator, which makes batch tensors of table rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TableError
from ..generation.teachers import batches_of_like_length
from ..models import Positions
from ..table.schema import RESIDUAL, TEACHER_ID, TOPK_COLUMNS
from .packing import best_fit_decreasing

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# Key that marks a row of a stream that only fills up the last batch.
FILLER = "is_filler"
Batch = dict[str, Tensor | list[str | None]]


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def padded_length(length: int, multiple: int | None) -> int:
    """Returns the length that a row of `length` tokens is padded to if it is the longest of its batch."""
    return -(-length // (multiple or 1)) * (multiple or 1)


def completion_room(
    prompt_lengths: np.ndarray | int, max_completion_length: int | None, max_length: int | None
) -> np.ndarray | np.int64:
    """Returns how many completion tokens fit after prompts of these lengths under both limits."""
    no_limit = np.iinfo(np.int64).max
    room = (no_limit if max_length is None else max_length) - prompt_lengths
    return np.minimum(room, no_limit if max_completion_length is None else max_completion_length)


@dataclass
class OfflineOPDCollator:
    """Collator that makes a batch of rows, padded on the right, or concatenated without padding.

    It returns a dict of tensors. Inputs of the model:

    - `input_ids` and `attention_mask` `(batch, time)`; with `padding_free`, `input_ids` and `position_ids` `(1,
      tokens)`, the positions from 0 in every sequence.

    The trained tokens of all sequences, concatenated; prompts, padding and tokens where `completion_mask` is false
    have no entry:

    - `positions` `(trained,)` int64: index, in the flattened `input_ids`, of the preceding token, which predicts it.
    - `labels` `(trained,)` int64: its id.
    - `sequences` `(trained,)` int64: index of its sequence in the batch.
    - `teacher_logprobs` or `residual_logprobs` and, where the rows have them, `ref_logprobs` `(trained,)` float32,
      `teacher_topk_ids` int64 and `teacher_topk_logprobs` float32 `(trained, k)`.

    For each sequence, `truncated` `(sequences,)`: whether its completion, with every per-token column, was truncated
    on the right to fit the limits. With `read`, also `teacher_fingerprint`, `teacher_id` and
    `student_fingerprint`, lists of strings, and `is_filler` `(sequences,)`, see [`~rows.WholeStream`]. With
    `teacher_weights`, `weights` `(sequences,)` float32.

    Args:
        pad_token_id: pads `input_ids`.
        max_completion_length: limit of the completion, in tokens.
        max_length: limit of prompt and completion together, in tokens.
        pad_to_multiple_of: the padded length is a multiple of this.
        teacher_logprob_floor: stands in for teacher log-probabilities of `-inf`.
        padding_free: flattens the batch instead of padding it.
        positions: how long a row the model can read.
        max_tokens: splits the batch into micro-batches of at most this many tokens, padding included, as few as
            best-fit decreasing finds, and returns them as a list.
        read: called first with the items of each batch, to make valid rows of what a stream yields.
        teacher_weights: weight of the rows of each `teacher_id`.

    Raises:
        TableError: a prompt leaves no room for a completion, all trainable tokens of a completion were truncated, or a
            row is longer than `max_tokens` or than a model with absolute positions can read.
    """

    pad_token_id: int
    max_completion_length: int | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    teacher_logprob_floor: float | None = None
    padding_free: bool = False
    positions: Positions = Positions(None, False)
    max_tokens: int | None = None
    read: Callable[[list[Any]], list[Row]] | None = None
    teacher_weights: dict[str, float] | None = None

    def __call__(self, items: list[Row | list[Row]]) -> Batch | list[Batch]:
        """Makes a batch of rows. An item may also be a pack, a list of rows."""
        rows = [row for item in items for row in (item if isinstance(item, list) else [item])]
        if self.read is not None:
            rows = self.read(rows)
        spans = [self._span(row) for row in rows]
        if self.max_tokens is None:
            return self._batch(rows, spans)
        return [self._batch([rows[i] for i in part], [spans[i] for i in part]) for part in self._parts(spans)]

    def _span(self, row: Row) -> slice:
        """Returns the part of the sequence that the completion, truncated to the limits, occupies."""
        start = len(row["prompt_ids"])
        room = completion_room(start, self.max_completion_length, self.max_length)
        if room < 1:
            raise TableError(
                f"A prompt of {start} tokens leaves no room for a completion within "
                f"`max_length={self.max_length}`. Raise `max_length`, or filter such rows out of the table."
            )
        end = start + min(len(row["completion_ids"]), int(room))
        if self.positions.limit is not None and end > self.positions.limit:
            if self.positions.fails:
                raise TableError(
                    f"A row has {end} tokens, more than the {self.positions.limit} positions of the student. Set "
                    f"`max_length={self.positions.limit}`, which truncates completions, or filter such rows out of "
                    "the table."
                )
            if self.read is not None:  # for tables, `check_positions` has warned already
                _warn_once(
                    f"Rows are longer than the {self.positions.limit} positions of the student. It reads them with "
                    "rotations that it was not trained on. `max_length` truncates completions."
                )
        return slice(start, end)

    def _parts(self, spans: list[slice]) -> list[np.ndarray]:
        """Returns the indices of the sequences in each micro-batch."""
        widths = np.array(
            [span.stop if self.padding_free else padded_length(span.stop, self.pad_to_multiple_of) for span in spans]
        )
        if widths.max() > self.max_tokens:
            raise TableError(too_long(int(widths.max()), self.max_tokens))
        if self.padding_free:
            return best_fit_decreasing(widths, self.max_tokens)
        return list(batches_of_like_length(widths, self.max_tokens))

    def _batch(self, rows: list[Row], spans: list[slice]) -> Batch:
        ends = np.array([span.stop for span in spans])
        # `starts` holds the index in the flattened `input_ids` at which each sequence starts.
        if self.padding_free:
            starts, shape = np.cumsum(ends) - ends, (1, int(ends.sum()))
        else:
            width = padded_length(int(ends.max()), self.pad_to_multiple_of)
            starts, shape = np.arange(len(rows)) * width, (len(rows), width)

        input_ids = np.full(shape[0] * shape[1], self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, span, start in zip(rows, spans, starts, strict=True):
            input_ids[start : start + span.start] = row["prompt_ids"]
            input_ids[start + span.start : start + span.stop] = row["completion_ids"][: span.stop - span.start]
            attention_mask[start : start + span.stop] = 1
        batch = {"input_ids": input_ids.reshape(shape)}
        if self.padding_free:
            batch["position_ids"] = (np.arange(shape[1]) - np.repeat(starts, ends)).reshape(shape)
        else:
            batch["attention_mask"] = attention_mask.reshape(shape)

        trained = [self._trained(row, span) for row, span in zip(rows, spans, strict=True)]
        counts = np.array([len(tokens) for tokens in trained])
        firsts = starts + np.array([span.start for span in spans])
        batch["positions"] = np.repeat(firsts - 1, counts) + np.concatenate(trained)
        batch["labels"] = input_ids[batch["positions"] + 1]
        batch["sequences"] = np.repeat(np.arange(len(rows)), counts)
        for name in ("teacher_logprobs", RESIDUAL, "ref_logprobs", *TOPK_COLUMNS):
            if rows[0].get(name) is not None:
                batch[name] = self._column(name, rows, trained)
        batch["truncated"] = np.array(
            [len(row["completion_ids"]) > span.stop - span.start for row, span in zip(rows, spans, strict=True)]
        )
        if self.teacher_weights is not None:
            batch["weights"] = np.array([self._weight(row) for row in rows], dtype=np.float32)
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        if self.read is not None:
            # The collator may run in a dataloader worker, so fingerprints go into the batch. The training process
            # checks and counts them.
            for name in ("teacher_fingerprint", TEACHER_ID, "student_fingerprint"):
                tensors[name] = [row.get(name) for row in rows]
            tensors[FILLER] = torch.tensor([bool(row.get(FILLER)) for row in rows])
        return tensors

    def _weight(self, row: Row) -> float:
        weight = self.teacher_weights.get(row.get(TEACHER_ID))
        if weight is None:
            raise TableError(f"A row cannot be weighed: {no_weight(row.get(TEACHER_ID), self.teacher_weights)}")
        return weight

    @staticmethod
    def _trained(row: Row, span: slice) -> np.ndarray:
        """Returns the indices of the completion tokens that fit and are trained."""
        fitting = span.stop - span.start
        if row.get("completion_mask") is None:
            return np.arange(fitting)
        trained = np.flatnonzero(row["completion_mask"][:fitting])
        if not len(trained):
            raise TableError(
                f"All trainable tokens of a completion lie beyond its first {fitting} tokens and were cut. Raise "
                "`max_completion_length` or `max_length`, or filter such rows out of the table."
            )
        return trained

    def _column(self, name: str, rows: list[Row], trained: list[np.ndarray]) -> np.ndarray:
        """Returns a per-token column of the trained tokens, `(trained,)` or `(trained, k)`."""
        parts = [np.asarray(row[name]) for row in rows]
        shape = (sum(map(len, trained)), *parts[0].shape[1:])
        values = np.empty(shape, dtype=np.int64 if name.endswith("ids") else np.float32)
        # Filling in place is faster: with top-k columns, joining and converting would cost more than reading the rows.
        end = 0
        for part, tokens in zip(parts, trained, strict=True):
            start, end = end, end + len(tokens)
            # Distinct ascending indices that end at their count minus 1 have no gaps, so a slice is enough.
            values[start:end] = part[: len(tokens)] if tokens[-1] == len(tokens) - 1 else part[tokens]
        if name in ("teacher_logprobs", "teacher_topk_logprobs") and self.teacher_logprob_floor is not None:
            values[values == -np.inf] = self.teacher_logprob_floor
        return values


def no_weight(teacher_id: str | None, weights: dict[str, float]) -> str:
    """Returns the error message for a row whose teacher has no weight."""
    return (
        f"its `{TEACHER_ID}` is {teacher_id!r}, for which `teacher_weights` has no weight, only for "
        f"{', '.join(map(repr, weights))}. Give one for each; 1.0 is neutral."
    )


def too_long(length: int, max_tokens: int) -> str:
    """Returns the error message for a row that does not fit into a micro-batch."""
    return (
        f"{length} tokens in one row, padding included, are more than `max_tokens_per_device={max_tokens}`. Raise it, "
        "or lower `max_length` or `max_completion_length`, which truncate completions."
    )
