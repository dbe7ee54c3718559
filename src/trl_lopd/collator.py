"""Rows of the table become batch tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .table import TableError


def completion_room(prompt_length: int, max_completion_length: int | None, max_length: int | None) -> int | None:
    """Completion tokens that fit behind a prompt under both limits; `None` if there is no limit."""
    rooms = [max_completion_length, None if max_length is None else max_length - prompt_length]
    return min((room for room in rooms if room is not None), default=None)


@dataclass
class OfflineOPDCollator:
    """Pads rows on the right into one batch.

    Returns a dict of tensors. What the model reads: `input_ids`, `attention_mask` `(batch, time)`. The `n` trained
    tokens of all sequences, one after another: `positions (n,)`, where in the flattened `input_ids` the token before
    each stands; `labels (n,)`, their ids; `sequences (n,)`, which sequence each is of; `teacher_logprobs` and, where
    the rows have them, `ref_logprobs` `(n,)` float32, `teacher_topk_ids` and `teacher_topk_logprobs` `(n, k)`. And
    `truncated (batch,)`, true for completions cut on the right to fit the limits, with every per-token column.

    Args:
        pad_token_id: pads `input_ids`.
        max_completion_length: limit of the completion, in tokens.
        max_length: limit of prompt and completion together, in tokens.
        pad_to_multiple_of: the padded length is a multiple of this.
        teacher_logprob_floor: stands in for teacher log-probabilities of `-inf`.
        validate: called with each batch's rows before anything else; for rows nobody has validated yet.

    Raises:
        TableError: a prompt that leaves no room for a completion, or a completion whose trainable tokens were all cut.
    """

    pad_token_id: int
    max_completion_length: int | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    teacher_logprob_floor: float | None = None
    validate: Callable[[list[dict[str, Any]]], None] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.validate is not None:
            self.validate(rows)
        # Filled in place: with top-k columns, joining and then padding would cost more than reading the rows.
        spans = [self._span(row) for row in rows]
        time = max(span.stop for span in spans)
        if self.pad_to_multiple_of is not None:
            time = -(-time // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), time)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
            input_ids[i, : span.start] = torch.tensor(row["prompt_ids"])
            input_ids[i, span] = self._cut(row["completion_ids"], span)
            attention_mask[i, : span.stop] = 1
        positions, trained = [], []
        for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
            kept = self._trained(row, span) if row.get("completion_mask") is not None else slice(None)
            trained.append(kept)
            positions.append((torch.arange(span.start - 1, span.stop - 1) + i * time)[kept])
        positions_flat = torch.cat(positions)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": positions_flat,
            "labels": input_ids.flatten()[positions_flat + 1],
            "sequences": torch.repeat_interleave(torch.tensor([len(p) for p in positions])),
        }
        for name in ("teacher_logprobs", "ref_logprobs", "teacher_topk_logprobs", "teacher_topk_ids"):
            if rows[0].get(name) is not None:
                batch[name] = self._aligned(name, rows, spans, trained)
        cut = [len(row["completion_ids"]) > span.stop - span.start for row, span in zip(rows, spans, strict=True)]
        return batch | {"truncated": torch.tensor(cut)}

    def _span(self, row: dict[str, Any]) -> slice:
        """Where in the sequence the completion stands, as far as it fits."""
        start = len(row["prompt_ids"])
        room = completion_room(start, self.max_completion_length, self.max_length)
        if room is not None and room < 1:
            raise TableError(
                f"A prompt of {start} tokens leaves no room for a completion within "
                f"`max_length={self.max_length}`. Raise `max_length`, or filter such rows out of the table."
            )
        tokens = len(row["completion_ids"])
        return slice(start, start + (tokens if room is None else min(tokens, room)))

    @staticmethod
    def _cut(values: Any, span: slice) -> Tensor:
        return torch.tensor(values)[: span.stop - span.start]

    def _trained(self, row: dict[str, Any], span: slice) -> Tensor:
        trained = self._cut(row["completion_mask"], span).bool()
        if not trained.any():
            raise TableError(
                f"All trainable tokens of a completion lie beyond its first {span.stop - span.start} tokens and were "
                "cut. Raise `max_completion_length` or `max_length`, or filter such rows out of the table."
            )
        return trained

    def _aligned(self, name: str, rows: list[dict[str, Any]], spans: list[slice], trained: list) -> Tensor:
        """A per-token column of the trained tokens, `(n,)` or `(n, k)`."""
        parts = [self._cut(row[name], span)[kept] for row, span, kept in zip(rows, spans, trained, strict=True)]
        values = torch.cat(parts).to(torch.long if name.endswith("ids") else torch.float32)
        if name in ("teacher_logprobs", "teacher_topk_logprobs") and self.teacher_logprob_floor is not None:
            values.masked_fill_(values == -torch.inf, self.teacher_logprob_floor)
        return values
