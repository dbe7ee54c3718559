"""Training on one batch in several forward and backward passes, so that a device holds fewer tokens at once.

The collator splits a batch into micro-batches of at most `max_tokens_per_device` tokens. Their gradients add up to
that of the batch. Processes with fewer micro-batches repeat one with weight 0 to stay in step with the others.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from .monitoring.metrics import Window

Batch = dict[str, Any]


def micro_batches(batch: Batch | list[Batch]) -> list[Batch]:
    """Returns the micro-batches in an output of the collator."""
    return batch if isinstance(batch, list) else [batch]


def flattened(batch: Batch | list[Batch]) -> Batch:
    """Concatenates the inputs of all micro-batches of a batch in one row; returns other batches unchanged."""
    if not isinstance(batch, list):
        return batch
    names = [name for name in ("input_ids", "attention_mask") if name in batch[0]]
    return {name: torch.cat([part[name].flatten() for part in batch]) for name in names}


def train_on(
    parts: list[Batch],
    step: Callable[[Batch, Tensor | None], Tensor],
    num_items: Tensor | None,
    accelerator: Accelerator,
    model: torch.nn.Module,
    window: Window,
) -> Tensor:
    """
    Computes the gradients of a batch's micro-batches, one after another.

    Args:
        parts (`list` of batches): Micro-batches of this process.
        step (`Callable`): Makes the forward and backward pass of a micro-batch; its second argument is `num_items`.
        num_items (`Tensor`, *optional*): Number of items that the loss of the whole batch is the mean over.
        accelerator ([`~accelerate.Accelerator`]): The processes, which must all call this.
        model ([`~torch.nn.Module`]): The model as wrapped by its engine.
        window ([`Window`]): Collects the metrics of the micro-batches.

    Returns:
        `Tensor`: The loss of the batch.
    """
    # Sharded models communicate in every forward, so all processes make the same number of passes.
    most = int(accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max())
    last_of_step, loss = accelerator.sync_gradients, 0.0
    for i in range(most):
        last = i == most - 1
        # DeepSpeed takes its optimizer step in the backward that synchronizes.
        accelerator.gradient_state._set_sync_gradients(last_of_step and last)
        with contextlib.nullcontext() if last else _gradients_kept_local(accelerator, model, last_of_step):
            if i < len(parts):
                loss += step(parts[i], num_items)
            else:
                smallest = min(parts, key=lambda part: part["input_ids"].numel())
                # A pass that only keeps step: divided by infinity, its loss and gradient are 0.
                with window.paused():
                    step(smallest, torch.tensor(math.inf, device=accelerator.device))
    return loss


def _gradients_kept_local(
    accelerator: Accelerator, model: torch.nn.Module, last_of_step: bool
) -> contextlib.AbstractContextManager:
    """Skips the synchronization of gradients in all micro-batches but the last of an optimizer step. In accumulation
    steps before the last one, `Trainer` skips it already."""
    if (
        not last_of_step
        or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        or accelerator.distributed_type == DistributedType.DEEPSPEED
    ):
        return contextlib.nullcontext()
    return accelerator.no_sync(model)
