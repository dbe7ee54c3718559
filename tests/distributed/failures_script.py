"""
Trains on however many processes started it, and has something happen to the last of them in its fifth batch.

    failures_script.py ENGINE WHAT STUDENT ROWS OUT
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from datasets import load_from_disk
from effopd_script import begin, fsdp_on_cpu, make_trainer
from transformers import TrainerCallback

from trl_lopd.training.collator import OfflineOPDCollator

LAST = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1


def spoil(trainer, batch):
    for name in ("teacher_logprobs", "teacher_topk_logprobs"):
        batch[name].fill_(torch.nan)


def exhaust(trainer, batch):
    """More than any machine has, asked of torch's own allocator."""
    trainer.model.get_decoder().layers[0].mlp.forward = lambda *args: torch.empty(1 << 55, dtype=torch.uint8)


def terminate(trainer, batch):
    """The launcher, or this process if it has none."""
    os.kill(os.getppid() if "RANK" in os.environ else os.getpid(), signal.SIGTERM)


class OneLine(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and LAST:
            print(f"step {state.global_step} loss {logs['loss']:.9f} at {time.time():.1f}", flush=True)


def main(engine, what, student, rows, out, *options):
    fsdp_on_cpu()
    begin(engine)
    table = load_from_disk(rows)
    trainer = make_trainer(
        engine,
        student,
        table.to_iterable_dataset() if what == "row" else table,
        out,
        max_steps=8,
        save_strategy="steps",
        save_steps=1 if what == "nan" else 100,
        enable_jit_checkpoint="sigterm" in what,
        activation_checkpointing=False,
    )
    trainer.add_callback(OneLine())
    collate, happen = OfflineOPDCollator.__call__, {"nan": spoil, "memory": exhaust, "sigterm": terminate}.get(what)
    batches = 0

    def collate_and_count(self, rows):
        nonlocal batches
        batch = collate(self, rows)
        batches += 1
        if what == "sigterm":
            time.sleep(0.1)
        if happen and LAST and batches == 5:
            print(f"HAPPENS AT {time.time()}", flush=True)
            happen(trainer, batch)
        return batch

    if happen:
        OfflineOPDCollator.__call__ = collate_and_count
    trainer.train(resume_from_checkpoint=what == "sigterm_resumed" or None)
    print("TRAINED", trainer.state.global_step, flush=True)
    trainer.save_model(f"{out}/final")


if __name__ == "__main__":
    main(*sys.argv[1:])
