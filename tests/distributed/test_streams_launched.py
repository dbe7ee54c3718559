"""Really launched processes that read streams: each row is evaluated once, and the card has the rows of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
from datasets import load_from_disk
from tiny import make_model, make_rollouts

from trl_lopd import read_model_card, score_rollouts

SCRIPT = Path(__file__).parent / "streams_script.py"


@pytest.fixture(scope="module")
def launched(tmp_path_factory, teacher_dir, student_dir, tokenizer):
    path = tmp_path_factory.mktemp("streams")
    own = score_rollouts(make_rollouts(24), str(teacher_dir), top_k=4)
    foreign = score_rollouts(make_rollouts(24, seed=5), make_model(seed=9), processing_class=tokenizer, top_k=4)
    for name, rows in (("table", own), ("foreign", foreign)):
        rows.add_column("teacher_id", ["math" if i % 3 else "code" for i in range(24)]).save_to_disk(path / name)
    done = ranks.launch(SCRIPT, student_dir, path / "table", path / "foreign", path / "out")
    assert done.returncode == 0, done.stderr[-5000:]
    return path


def test_a_stream_is_evaluated_as_the_table_is(launched):
    metrics = json.loads((launched / "out" / "evaluations.json").read_text())
    assert len(metrics) == 4 + (1 + 2 + 3 + 3) + 3
    for name, stream in metrics.items():
        table = metrics[name.partition(",")[0]]
        keys = ["eval_loss", "eval_reverse_kl_topk", "eval_entropy", "eval_huber"]
        if not name.startswith("1 rows"):  # with the metrics of each teacher
            keys += [key.replace("eval_", f"eval_{teacher}/") for teacher in ("code", "math") for key in keys]
        for key in keys:
            assert stream[key] == pytest.approx(table[key], rel=1e-5), (name, key)


def test_the_card_has_the_rows_of_all_processes(launched):
    own, other = (load_from_disk(launched / name)[0]["teacher_fingerprint"] for name in ("table", "foreign"))
    (card,) = read_model_card(launched / "out" / "final")["opd_rounds"]
    assert {teacher["id"]: teacher["rows"] for teacher in card["teachers"]} == {own: 8, other: 8}
    assert (card["rows"], card["teacher_consistency"]) == (16, "overridden (warn)")


def test_shards_of_different_sizes_keep_nobody_waiting(launched):
    (card,) = read_model_card(launched / "out" / "uneven")["opd_rounds"]
    assert card["rows"] == 6 * 2 * 4
