"""
Trains within a budget of tokens on however many processes started it.

    micro_batches_script.py STUDENT ROWS OUT KIND:CASE ...

Of the KINDS of `effopd_script` and the CASES here. The rows are of the teachers in WEIGHTS. Writes to OUT, by kind and
case, the weights, and by rank what was read, exchanged and logged, and where rows are weighted an evaluation.
"""

from __future__ import annotations

import functools
import sys

from effopd_script import WORLD, make_trainer, run, save_weights
from torch.distributed.tensor import DTensor

BUDGET = {"max_tokens_per_device": 24}
WEIGHTS = {"teacher_weights": {"math": 1.5, "code": 0.25}}
CASES = {
    "whole": {},
    "weighted": WEIGHTS,
    "budget": BUDGET,
    "budget_padding_free": BUDGET | {"padding_free": True},
    "budget_weighted": BUDGET | WEIGHTS,
}


def train(kind, student, rows, out, **options):
    trainer = make_trainer(
        kind, student, rows, out, max_steps=4, per_device_train_batch_size=8 // WORLD, gradient_accumulation_steps=2,
        **options,
    )  # fmt: skip
    made, read, exchanged = [], [], 0
    training_step = trainer.training_step

    def watched(model, inputs, num_items_in_batch=None):
        read.append(0)
        made.append(len(inputs) if isinstance(inputs, list) else 1)
        return training_step(model, inputs, num_items_in_batch)

    def count(model, args, inputs):
        nonlocal exchanged
        # One that reads but does not train tries the boundaries.
        read[-1] += model.training
        exchanged += model.training and getattr(trainer.model_wrapped, "require_backward_grad_sync", False)

    trainer.training_step = watched
    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    parameters = list(trainer.model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters) == (kind == "fsdp2")
    assert all(hasattr(p, "ds_id") and p.numel() == 0 for p in parameters) == (kind == "zero3")
    save_weights(trainer, out)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    said = {"made": made, "read": read, "exchanged": exchanged, "logs": logs}
    if "teacher_weights" in options:
        said["evaluation"] = trainer.evaluate()
    return said


if __name__ == "__main__":
    run({case: functools.partial(train, **options) for case, options in CASES.items()}, *sys.argv[1:])
