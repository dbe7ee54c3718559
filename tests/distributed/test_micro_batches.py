"""Really launched processes that read their batches in different numbers of micro-batches, against one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import ranks
import torch
from conftest import make_rollouts

from trl_lopd import score_rollouts

SCRIPT = Path(__file__).parent / "micro_batches_script.py"
KINDS = ["ddp", "zero3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp2", "zero2"))]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, teacher_dir, student_dir):
    path = tmp_path_factory.mktemp("micro_batches")
    rows = score_rollouts(make_rollouts(64), str(teacher_dir), top_k=4, ref_model=str(student_dir))
    rows.add_column("teacher_id", ["math" if i % 3 else "code" for i in range(64)]).save_to_disk(path / "rows")
    done = {}

    def run(kind):
        """The folder of what a kind wrote."""
        if kind not in done:
            processes = None if kind == "single" else 2
            done[kind] = ranks.launch(SCRIPT, student_dir, path / "rows", path / "out", kind, processes=processes)
        assert done[kind].returncode == 0, done[kind].stderr[-5000:]
        return path / "out" / kind

    return run


@pytest.mark.parametrize("way", ["budget", "budget_padding_free"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_changes_nothing_but_what_is_read_at_once(launch, kind, way):
    """
    Four steps of Adam with two accumulation steps of 8 rows each, in float32.

    The same sums are added in another order. With an epsilon of 1e-3, Adam turns what that does to a gradient into
    about a thousandth of it, times the learning rate of 1e-3; a row that is lost or counted twice moves most weights
    by more than 1e-5.
    """
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    out = launch(kind)
    said = [json.loads((out / way / f"{rank}.json").read_text()) for rank in range(2)]
    made = [rank["made"] for rank in said]
    assert len(made[0]) == 8 and made[0] != made[1] and max(made[0]) > 1
    # As many on both, at every step.
    assert said[0]["read"] == said[1]["read"] == [max(both) for both in zip(*made, strict=True)]
    if kind == "ddp":
        # In the last backward of each of the four steps.
        assert [rank["exchanged"] for rank in said] == [4, 4]

    assert_same_training(launch("single") / "whole", out / way)
    for log in said[0]["logs"]:
        assert (log["padding"] == 0) == (way == "budget_padding_free")


@pytest.mark.parametrize("way", ["weighted", "budget_weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_teachers_are_those_of_one_process(launch, kind, way):
    """The same steps and tolerances, and what an evaluation says of each teacher."""
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    one = launch("single")
    assert_same_training(one / "weighted", launch(kind) / way)
    plain, weighted = (torch.load(one / name / "weights.pt") for name in ("whole", "weighted"))
    assert max((plain[name] - weighted[name]).abs().max() for name in plain) > 1e-4
    expected, found = (
        json.loads((out / "0.json").read_text())["evaluation"] for out in (one / "weighted", launch(kind) / way)
    )
    names = [name for name in expected if not re.search("second|time|epoch", name)]
    assert {"eval_loss", "eval_math/reverse_kl_topk", "eval_code/loss"} <= {*names}
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def assert_same_training(one, out):
    """The weights, and what was logged."""
    expected, found = torch.load(one / "weights.pt"), torch.load(out / "weights.pt")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n} {m}")
    logs, found = (json.loads((directory / "0.json").read_text())["logs"] for directory in (one, out))
    for a, b in zip(logs, found, strict=True):
        for name in ("loss", "grad_norm", "huber", "reverse_kl_topk", "entropy", "importance_weight/max"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
