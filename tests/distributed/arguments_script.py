"""
Trains on however many processes started it, each of which gets a part of every batch.

    arguments_script.py STUDENT TABLE OUT

Writes what was logged to OUT, by rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import load_from_disk
from effopd_script import RANK, make_trainer


def main(student, table, out):
    trainer = make_trainer(
        "ddp", student, load_from_disk(table), out, max_steps=3, accelerator_config={"split_batches": True},
        gradient_accumulation_steps=1, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    trainer.train()
    (Path(out) / f"{RANK}.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
