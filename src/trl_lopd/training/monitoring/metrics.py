"""Totals of batches, windows and processes, and the metrics computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ...table.schema import rows_of_each
from ..collator import FILLER
from ..objective import mean_loss, summarize

Totals = dict[str, Tensor]


class Window:
    """
    Totals of the training batches since the last log. They stay on the device until then, so that there is one gather
    per log and none per step.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.totals: Totals = {}
        self._paused = False

    def add(self, totals: Totals) -> None:
        """Adds a batch's totals, one value per sequence or one for all; see [`~objective.sequence_totals`]."""
        if self._paused:
            return
        for name, values in totals.items():
            total = _combine(name, values)
            if name in self.totals:
                total = _combine(name, torch.stack([self.totals[name], total]))
            self.totals[name] = total

    def add_padding(self, batch: Totals) -> None:
        """Adds the number of tokens in a batch, and how many of them are padding."""
        tokens = batch["input_ids"].new_tensor([batch["input_ids"].numel()])
        padding = tokens - batch["attention_mask"].sum() if "attention_mask" in batch else torch.zeros_like(tokens)
        device = self.accelerator.device
        self.add({"tokens_read": tokens.to(device), "tokens_padding": padding.to(device)})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignores totals inside a `with` block, for a batch that does not count."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def reset(self) -> None:
        """Discards the totals that were not logged."""
        self.totals = {}

    def close(self) -> dict[str, float]:
        """Returns the metrics of all processes since the last call; see [`~objective.summarize`]. All processes must
        call this."""
        if not self.totals:
            return {}
        names = sorted(self.totals)
        values = [self.totals[name].float().reshape(1, -1) for name in names]
        gathered = self.accelerator.gather(torch.cat(values, dim=-1)).double().cpu()
        parts = gathered.split([value.shape[1] for value in values], dim=-1)
        self.reset()
        return _metrics({name: _number(_combine(name, part)) for name, part in zip(names, parts, strict=True)})


class EvaluationTotals:
    """
    Totals of the evaluated sequences of all processes.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.batches: list[Totals] = []
        self._streamed_ids: list[list[str | None]] = []

    def add(self, totals: Totals, teacher_ids: list[str | None] | None = None) -> None:
        """
        Adds a batch's totals, one value per sequence. All processes must call this.

        Args:
            totals (`dict[str, Tensor]`): Totals of the sequences of this process.
            teacher_ids (`list[str | None]`, *optional*): Their teachers, where they are not known beforehand: of a
                stream.
        """
        if teacher_ids is not None:
            fillers = totals[FILLER].tolist() if FILLER in totals else [False] * len(teacher_ids)
            self._streamed_ids.append([id for id, fills in zip(teacher_ids, fillers, strict=True) if not fills])
        # `gather_for_metrics` drops the rows that were repeated to fill the last batch, so totals are per sequence.
        names, num_sequences = sorted(totals), len(totals["truncated"])
        columns = [totals[name].float().reshape(num_sequences, -1) for name in names]
        gathered = self.accelerator.gather_for_metrics(torch.cat(columns, dim=-1))
        parts = gathered.split([column.shape[1] for column in columns], dim=-1)
        totals = {name: part.squeeze(-1) for name, part in zip(names, parts, strict=True)}
        if FILLER in totals:
            evaluated = totals.pop(FILLER) == 0
            totals = {name: values[evaluated] for name, values in totals.items()}
        self.batches.append(totals)

    def of_sequences(self, name: str) -> np.ndarray:
        """Returns one of the totals for each sequence, `(sequences,)` float64, in the order of the rows."""
        return torch.cat([batch[name] for batch in self.batches]).double().cpu().numpy()

    def _gather_streamed_ids(self) -> np.ndarray | None:
        """Returns the teachers of a stream's sequences in the order of the totals, `(sequences,)`; `None` without."""
        if not self._streamed_ids:
            return None
        of_processes = [self._streamed_ids]
        if self.accelerator.num_processes > 1:
            of_processes = gather_object([self._streamed_ids])
        batches = zip(*of_processes, strict=True)
        return np.array([id for batch in batches for part in batch for id in part], dtype=object)

    def metrics(self, aggregation: str, teacher_ids: np.ndarray | None = None) -> dict[str, float]:
        """
        Returns the loss over all sequences and the other metrics; empty if there were no sequences. All processes must
        call this.

        Args:
            aggregation (`str`): What the loss is the mean over.
            teacher_ids (`(sequences,)` array, *optional*): The teacher of each; those given to [`add`] otherwise. With
                several different ones, each also has metrics of its own, `teacher_id/name`.
        """
        if teacher_ids is None:
            teacher_ids = self._gather_streamed_ids()
        names = self.batches[0] if self.batches else ()
        columns = {name: torch.cat([batch[name] for batch in self.batches]).double().cpu() for name in names}
        if not columns:
            return {}

        def of(rows: slice | np.ndarray) -> dict[str, float]:
            totals = {name: _number(_combine(name, values[rows])) for name, values in columns.items()}
            return {"loss": mean_loss(totals, aggregation), **_metrics(totals)}

        metrics = of(slice(None))
        for teacher_id, rows in rows_of_each(teacher_ids).items():
            metrics |= {f"{teacher_id}/{name}": value for name, value in of(rows).items()}
        return metrics


def _combine(name: str, values: Tensor) -> Tensor:
    return values.amax(0) if name.endswith("max") else values.sum(0)


def _number(values: Tensor) -> float | np.ndarray:
    return values.item() if values.numel() == 1 else values.numpy()


def _metrics(totals: dict[str, float | np.ndarray]) -> dict[str, float]:
    metrics = summarize(totals)
    if totals["truncated"]:
        metrics["truncated_completions"] = totals["truncated"]
    if "aux_loss" in totals:
        metrics["aux_loss"] = totals["aux_loss"] / totals["aux_items"]
    if "tokens_read" in totals:
        metrics["padding"] = totals["tokens_padding"] / totals["tokens_read"]
    return metrics
