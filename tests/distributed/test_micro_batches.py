"""Really launched processes that read their batches in different numbers of micro-batches, against one process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from launcher import Launcher, parameters
from tiny import make_rollouts

from trl_lopd import score_rollouts

SCRIPT = Path(__file__).parent / "micro_batches_script.py"
WAYS = ["budget", "budget_padding_free", "weighted", "budget_weighted"]
GROUPS = {
    "single": {"single": ["whole", "weighted"]},
    "torch": {"ddp": WAYS, "fsdp2": WAYS},
    "zero": {"zero2": WAYS, "zero3": WAYS},
}
# ZeRO-3, which would wait for ever for a pass that the other process does not make, does both at once.
SLOW = {(kind, way) for kind in ("fsdp2", "zero2", "zero3") for way in WAYS} - {("zero3", "budget_weighted")}
SLOW |= {("ddp", "weighted")}


def having(*ways):
    kinds = [*GROUPS["torch"], *GROUPS["zero"]]
    return parameters([(kind, way) for kind in kinds for way in ways], SLOW)


@pytest.fixture(scope="module")
def launch(tmp_path_factory, teacher_dir, student_dir):
    path = tmp_path_factory.mktemp("micro_batches")
    rows = score_rollouts(make_rollouts(64), str(teacher_dir), top_k=4, ref_model=str(student_dir))
    rows.add_column("teacher_id", ["math" if i % 3 else "code" for i in range(64)]).save_to_disk(path / "rows")
    return Launcher(SCRIPT, student_dir, path / "rows", path / "out", groups=GROUPS, slow=SLOW)


@pytest.fixture(autouse=True)
def needs(request):
    if "zero" in request.node.callspec.params["kind"]:
        pytest.importorskip("deepspeed")


def assert_same_training(launch, kind, way, reference):
    """The weights, and what was logged."""
    for a, b in zip(launch("single", reference)["logs"], launch(kind, way)["logs"], strict=True):
        for name in ("loss", "grad_norm", "huber", "reverse_kl_topk", "entropy", "importance_weight/max"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    expected, found = launch.load("single", reference), launch.load(kind, way)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("kind, way", having("budget", "budget_padding_free", "budget_weighted"))
def test_a_budget_changes_nothing_but_what_is_read_at_once(launch, kind, way):
    """
    Four steps of Adam with two accumulation steps of 8 rows each, in float32.

    The same sums are added in another order. With an epsilon as large as the learning rate, 1e-3, a step of Adam
    moves a weight by no more than that moves its gradient.
    """
    said = [launch(kind, way, rank) for rank in range(2)]
    made = [rank["made"] for rank in said]
    assert len(made[0]) == 8 and made[0] != made[1] and max(made[0]) > 1
    # As many on both, at every step.
    assert said[0]["read"] == said[1]["read"] == [max(both) for both in zip(*made, strict=True)]
    if kind == "ddp":
        # In the last backward of each of the four steps.
        assert [rank["exchanged"] for rank in said] == [4, 4]

    assert_same_training(launch, kind, way, "weighted" if way == "budget_weighted" else "whole")
    for log in said[0]["logs"]:
        assert (log["padding"] == 0) == (way == "budget_padding_free")


@pytest.mark.parametrize("kind, way", having("weighted", "budget_weighted"))
def test_weights_of_teachers_are_those_of_one_process(launch, kind, way):
    """The same steps and tolerances, and what an evaluation says of each teacher."""
    expected, found = launch("single", "weighted"), launch(kind, way)
    if way == "weighted":  # the other is seen above
        assert_same_training(launch, kind, way, "weighted")
    plain, weighted = (launch.load("single", name) for name in ("whole", "weighted"))
    assert max((plain[name] - weighted[name]).abs().max() for name in plain) > 1e-4
    expected, found = expected["evaluation"], found["evaluation"]
    names = [name for name in expected if not re.search("second|time|epoch", name)]
    assert {"eval_loss", "eval_math/reverse_kl_topk", "eval_code/loss"} <= {*names}
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
