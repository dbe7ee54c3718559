"""Trains a student on a table under whatever launcher started it; the tests compare what comes out."""

from __future__ import annotations

import json
import sys

from datasets import load_from_disk
from trl import TrlParser

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer

if __name__ == "__main__":
    student, table = sys.argv[1:3]
    (args,) = TrlParser((OfflineOPDConfig,)).parse_args_and_config(sys.argv[3:])
    rows = load_from_disk(table)
    trainer = OfflineOPDTrainer(student, args, rows, eval_dataset=rows)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        with open(f"{args.output_dir}/result.json", "w") as file:
            json.dump({"processes": args.world_size, "history": trainer.state.log_history, "eval": metrics}, file)
