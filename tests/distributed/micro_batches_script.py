"""
Trains within a budget of tokens on however many processes started it.

    micro_batches_script.py STUDENT ROWS OUT KIND ...

Of the KINDS of `effopd_script`. The rows are of the teachers in WEIGHTS. Writes to OUT, by kind and way, the weights,
and by rank what was read, exchanged and logged, and where rows are weighted an evaluation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import accelerate.state
import torch.distributed as dist
from datasets import load_from_disk
from effopd_script import RANK, WORLD, fsdp_on_cpu, make_trainer, save_weights
from torch.distributed.tensor import DTensor

WAYS = {
    "budget": {"max_tokens_per_device": 24},
    "budget_padding_free": {"max_tokens_per_device": 24, "padding_free": True},
}
WEIGHTS = {"teacher_weights": {"math": 1.5, "code": 0.25}}
# Of DDP and of one process: what they are compared with.
WEIGHTED = {"weighted": WEIGHTS, "budget_weighted": WAYS["budget"] | WEIGHTS}
ALONE = {"whole": {}, "weighted": WEIGHTS}


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
    (out / f"{RANK}.json").write_text(json.dumps(said))


def main():
    student, rows, directory, *kinds = sys.argv[1:]
    fsdp_on_cpu()
    rows = load_from_disk(rows)
    for kind in kinds:
        if kind.startswith("zero"):
            import deepspeed

            deepspeed.init_distributed("gloo")
        ways = ALONE if WORLD == 1 else WAYS | WEIGHTED
        for way, options in ways.items():
            out = Path(directory, kind, way)
            out.mkdir(parents=True, exist_ok=True)
            train(kind, student, rows, out, **options)
            # Each trainer makes an accelerator of its own kind.
            accelerate.state.AcceleratorState._reset_state()
            accelerate.state.GradientState._reset_state()
    if WORLD > 1:
        # Gloo may abort a process that ends while the other one still talks to it.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
