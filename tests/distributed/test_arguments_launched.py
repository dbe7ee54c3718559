"""Really launched processes, with arguments of `TrainingArguments` that only matter to several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
from tiny import make_args

from trl_lopd import OfflineOPDTrainer

SCRIPT = Path(__file__).parent / "arguments_script.py"


def test_split_batches_are_those_of_one_process(tmp_path, student_dir, table):
    table.save_to_disk(tmp_path / "table")
    done = ranks.launch(SCRIPT, student_dir, tmp_path / "table", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-4000:]
    one = OfflineOPDTrainer(
        str(student_dir), make_args(tmp_path, max_steps=3, adam_epsilon=1e-3, eval_strategy="steps", eval_steps=3),
        table, eval_dataset=table,
    )  # fmt: skip
    one.train()
    for rank in range(2):
        logs = json.loads((tmp_path / "out" / f"{rank}.json").read_text())
        for log, expected in zip(logs, one.state.log_history, strict=True):
            names = {"loss", "eval_loss", "reverse_kl_topk", "eval_reverse_kl_topk", "entropy"} & expected.keys()
            assert [log[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-4)
