"""
Evaluates and trains on streams on however many processes started it.

    streams_script.py STUDENT TABLE FOREIGN OUT

TABLE and FOREIGN were scored by two teachers. Writes `OUT/evaluations.json`, by what was evaluated, and the models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import concatenate_datasets, load_from_disk
from effopd_script import make_trainer


def main(student, table, foreign, out):
    table, foreign = load_from_disk(table), load_from_disk(foreign)
    # In each batch of 4, those of the second process are foreign.
    parts = [rows.select(range(i, i + 2)) for i in range(0, 8, 2) for rows in (table, foreign)]
    trainer = make_trainer(
        "ddp", student, concatenate_datasets(parts).to_iterable_dataset(), out, max_steps=4,
        gradient_accumulation_steps=1, teacher_consistency="warn",
    )  # fmt: skip
    metrics = {}
    for rows in (1, 2, 9, 16):
        held_out = table.select(range(rows))
        metrics[f"{rows} rows"] = trainer.evaluate(held_out)
        for shards in (1, 2, 3):
            if shards <= rows:
                for workers in (0, 2) if rows == 9 else (0,):
                    trainer.args.dataloader_num_workers = workers
                    stream = held_out.to_iterable_dataset(num_shards=shards)
                    metrics[f"{rows} rows, {shards} shards, {workers} workers"] = trainer.evaluate(stream)
                trainer.args.dataloader_num_workers = 0
    trainer.train()
    trainer.save_model(f"{out}/final")
    # Shards of 7 rows, two of them for one process if each were to have its own.
    uneven = make_trainer(
        "ddp", student, table.select(range(21)).to_iterable_dataset(num_shards=3), f"{out}/uneven", max_steps=6,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    uneven.train()
    uneven.save_model()
    if trainer.is_world_process_zero():
        (Path(out) / "evaluations.json").write_text(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
