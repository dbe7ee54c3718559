"""One batch in several forward and backward passes, so that a device holds fewer tokens at once.

The collator splits a batch within `max_tokens_per_device`. The gradients of the micro-batches add up to that of the
batch, and processes whose batches fell into fewer of them keep step with the others.
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
    """The micro-batches of what the collator gives."""
    return batch if isinstance(batch, list) else [batch]


def flattened(batch: Batch | list[Batch]) -> Batch:
    """What a batch has the model read, all of its micro-batches in one row."""
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
    Takes the gradients of a batch's micro-batches, one after another.

    Args:
        parts (`list` of batches): This process's.
        step (`Callable`): Forward and backward of one of them, given what its loss is the mean over.
        num_items (`Tensor`, *optional*): What the loss of the whole batch is the mean over.
        accelerator ([`~accelerate.Accelerator`]): The processes, which all call this.
        model ([`~torch.nn.Module`]): The model as its engine wraps it.
        window ([`Window`]): The metrics of the micro-batches.

    Returns:
        `Tensor`: The loss of the batch.
    """
    # Sharded models communicate in every forward, so all processes make as many.
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
                # Divided by infinity, its loss and gradient are 0.
                with window.paused():
                    step(smallest, torch.tensor(math.inf, device=accelerator.device))
    return loss


def _gradients_kept_local(
    accelerator: Accelerator, model: torch.nn.Module, last_of_step: bool
) -> contextlib.AbstractContextManager:
    """Leaves out the exchange of gradients in all micro-batches but the last of an optimizer step. In accumulation
    steps before the last one, `Trainer` has done so already."""
    if (
        not last_of_step
        or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        or accelerator.distributed_type == DistributedType.DEEPSPEED
    ):
        return contextlib.nullcontext()
    return accelerator.no_sync(model)
