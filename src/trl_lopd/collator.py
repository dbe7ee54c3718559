"""Rows of the table become batch tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from .table import TableError


def completion_room(prompt_length: int, max_completion_length: int | None, max_length: int | None) -> int | None:
    """Completion tokens that fit behind a prompt under both limits; `None` if there is no limit."""
    rooms = [max_completion_length, None if max_length is None else max_length - prompt_length]
    return min((room for room in rooms if room is not None), default=None)


@dataclass
class OfflineOPDCollator:
    """Pads rows on the right into one batch, every per-token column aligned with `input_ids`.

    Returns a dict of tensors: `input_ids`, `attention_mask`, `labels` `(batch, time)`, with labels -100 on the prompt,
    the padding and where `completion_mask` is false; `teacher_logprobs` and, where the rows have them, `ref_logprobs`
    `(batch, time)` float32, `teacher_topk_ids` and `teacher_topk_logprobs` `(batch, time, k)`, all zero outside the
    completion; and `truncated` `(batch,)`, true for completions cut on the right to fit the limits, together with
    every per-token column.

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
        columns: dict[str, list[Tensor]] = {}
        for row in rows:
            for name, values in self._row_tensors(row).items():
                columns.setdefault(name, []).append(values)
        fill = {"input_ids": self.pad_token_id, "labels": -100}
        batch = {
            name: pad(values, padding_value=fill.get(name, 0), pad_to_multiple_of=self.pad_to_multiple_of)
            for name, values in columns.items()
            if name != "truncated"
        }
        return batch | {"truncated": torch.stack(columns["truncated"])}

    def _row_tensors(self, row: dict[str, Any]) -> dict[str, Tensor]:
        prompt = torch.tensor(row["prompt_ids"], dtype=torch.long)
        room = completion_room(len(prompt), self.max_completion_length, self.max_length)
        if room is not None and room < 1:
            raise TableError(
                f"A prompt of {len(prompt)} tokens leaves no room for a completion within "
                f"`max_length={self.max_length}`. Raise `max_length`, or filter such rows out of the table."
            )
        cut = slice(None, room)
        completion = torch.tensor(row["completion_ids"], dtype=torch.long)
        truncated = room is not None and len(completion) > room
        completion = completion[cut]
        labels = completion
        if row.get("completion_mask") is not None:
            trained = torch.tensor(row["completion_mask"], dtype=torch.bool)[cut]
            if not trained.any():
                raise TableError(
                    f"All trainable tokens of a completion lie beyond its first {room} tokens and were cut. Raise "
                    "`max_completion_length` or `max_length`, or filter such rows out of the table."
                )
            labels = completion.masked_fill(~trained, -100)
        input_ids = torch.cat([prompt, completion])
        tensors = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": torch.cat([torch.full_like(prompt, -100), labels]),
            "truncated": torch.tensor(truncated),
        }
        for name in ("teacher_logprobs", "ref_logprobs", "teacher_topk_logprobs", "teacher_topk_ids"):
            if row.get(name) is None:
                continue
            values = torch.tensor(row[name], dtype=torch.long if name.endswith("ids") else torch.float32)[cut]
            if name.startswith("teacher") and values.is_floating_point() and self.teacher_logprob_floor is not None:
                values = values.masked_fill(values == -torch.inf, self.teacher_logprob_floor)
            tensors[name] = torch.cat([values.new_zeros((len(prompt), *values.shape[1:])), values])
        return tensors
