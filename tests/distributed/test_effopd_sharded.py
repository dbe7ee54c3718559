"""EffOPD on really sharded weights: what one process does, and bit for bit back from where it should not stay."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from launcher import Launcher, parameters
from tiny import make_rollouts

from trl_lopd import score_rollouts

SCRIPT = Path(__file__).parent / "effopd_script.py"

# What the launches run; one launch for what starts up together.
ONE = ["scripted", "bf16_without_master", "lora", "by_default", "raising", "whole", "continued", "refused"]
TORCH = {
    "ddp": ["scripted"],
    "fsdp2": ["scripted", "raising", "whole", "continued", "refused"],
    "fsdp2-keep": ["scripted"],
}
# To EffOPD, stages 1 and 2 are one.
ZERO = {
    "zero2": ["scripted", "bf16", "lora", "whole", "continued"],
    "zero2-offload": ["bf16"],
    "zero3": ["scripted", "bf16", "by_default", "raising", "whole"],
    "zero3-persistent": ["scripted"],
    "zero3-offload": ["bf16"],
}
# Weights are sharded, published and gathered in three ways, by `fsdp2`, `zero2` and `zero3`: `scripted` is on each.
SLOW = {(kind, "scripted") for kind in ("ddp", "fsdp2-keep", "zero3-persistent")}
SLOW |= {(kind, "bf16") for kind in ("zero2", "zero2-offload", "zero3", "zero3-offload")}
SLOW |= {("zero2", case) for case in ("lora", "whole", "continued")}
SLOW |= {("zero3", case) for case in ("raising", "whole")} | {("fsdp2", "refused")}
# The default gate is that of `test_effopd` in one process.
SLOW |= {(kind, "by_default") for kind in ("single", "zero3")}


def having(*cases):
    pairs = [(kind, case) for case in cases for kind, those in (TORCH | ZERO).items() if case in those]
    return parameters(pairs, SLOW)


@pytest.fixture(scope="module")
def launch(tmp_path_factory, teacher_dir, student_dir):
    path = tmp_path_factory.mktemp("effopd")
    score_rollouts(make_rollouts(85), str(teacher_dir), top_k=4, ref_model=str(student_dir)).save_to_disk(
        path / "rows"
    )
    groups = {"single": {"single": ONE}, "torch": TORCH, "zero": ZERO}
    return Launcher(SCRIPT, student_dir, path / "rows", path / "out", groups=groups, slow=SLOW)


@pytest.fixture(autouse=True)
def needs(request):
    if "zero" in str(request.node.callspec.params.get("kind", "")):
        pytest.importorskip("deepspeed")


def decisions(result):
    return [(search["step"], search["accepted"], search["p_value"]) for search in result["history"]]


def without_seconds(result):
    return [{name: value for name, value in search.items() if name != "seconds"} for search in result["history"]]


def assert_close(weights, expected, atol=2e-6):
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("kind, case", having("scripted", "lora"))
def test_is_what_one_process_does(launch, kind, case):
    """
    After searches that were accepted and rejected, and the steps of Adam that follow them.

    The script also compares, on each process, what the engine holds before and after each search that is rejected, and
    the weights of the forward with the master copy; see there. The gate gives the second process other numbers.
    """
    expected = launch("single", case)
    for rank in range(2):
        found = launch(kind, case, rank)
        assert decisions(found) == decisions(expected)
        for a, b in zip(found["history"], expected["history"], strict=True):
            assert a["delta_norm"] == pytest.approx(b["delta_norm"], rel=1e-5)
            assert a["delta_cosine"] == pytest.approx(b["delta_cosine"], abs=1e-5)
        # The forward: of each candidate, when the gate saw it, and at the end.
        outputs = launch.load("single", case, "outputs-0")
        for i, (a, b) in enumerate(zip(launch.load(kind, case, f"outputs-{rank}"), outputs, strict=True)):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=lambda m, i=i: f"output {i}: {m}")
    assert_close(launch.load(kind, case), launch.load("single", case))


@pytest.mark.parametrize("kind, case", having("bf16")[1:])
def test_engines_agree_in_bf16(launch, kind, case):
    """With master copies in float32; each is checked in the script, here that they went the same way as ZeRO-2."""
    assert launch(kind, case)["history"][1]["delta_norm"] == pytest.approx(
        launch("zero2", "bf16")["history"][1]["delta_norm"], rel=1e-2
    )


@pytest.mark.parametrize("kind, case", having("scripted"))
def test_nothing_is_gathered(launch, kind, case):
    found = [launch(kind, case, rank) for rank in range(2)]
    for one in found:
        assert one["collectives"]["read"] == one["collectives"]["write"] == 0
        if kind == "zero2":
            # As the engine does after its own steps, for each of the two groups of parameters: nine times here.
            assert one["collectives"]["publish"] == 2 * 9
        elif kind != "zero3-persistent":
            assert one["collectives"]["publish"] == 0
    if kind == "ddp":
        assert all(one["owned"] == one["trained"] for one in found)
    else:
        # No more than padding beside halves.
        assert sum(one["owned"] for one in found) == pytest.approx(found[0]["trained"], rel=0.02)


@pytest.mark.parametrize("kind, case", having("by_default"))
def test_default_gate_decides_as_in_one_process(launch, kind, case):
    expected = launch("single", case)
    assert {search["accepted"] > 1 for search in expected["history"]} == {True, False}
    for rank in range(2):
        found = launch(kind, case, rank)
        assert decisions(found) == decisions(expected)
        for a, b in zip(found["history"], expected["history"], strict=True):
            assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)
    assert_close(launch.load(kind, case), launch.load("single", case))


@pytest.mark.parametrize("kind, case", [("single", "lora"), *having("lora")])
def test_of_lora_the_second_factors_move(launch, kind, case):
    names = {name for rank in range(1 if kind == "single" else 2) for name in launch(kind, case, rank)["names"]}
    assert len(names) == 4 and all(".lora_B." in name for name in names)


@pytest.mark.parametrize("kind, case", [("single", "continued"), *having("continued")])
def test_continues_from_a_checkpoint_as_if_it_had_not_stopped(launch, kind, case):
    for rank in range(1 if kind == "single" else 2):
        whole = launch(kind, "whole", rank)
        assert without_seconds(launch(kind, case, rank)) == without_seconds(whole)
    assert [search["accepted"] > 1 for search in whole["history"]].count(True) > 1
    assert_close(launch.load(kind, case), launch.load(kind, "whole"), atol=0)


@pytest.mark.parametrize(
    "kind, how",
    [("single", "killed_in_training"), pytest.param("zero3", "killed_in_search", marks=pytest.mark.slow)],
)
def test_resumes_after_being_killed(launch, kind, how):
    whole, processes = launch(kind, "whole"), None if kind == "single" else 2
    killed = launch.start(processes, [f"{kind}:{how}"])
    assert killed.returncode != 0 and (processes == 2 or killed.returncode == -signal.SIGKILL)
    done = launch.start(processes, [f"{kind}:resumed"])
    assert done.returncode == 0, done.stderr[-5000:]
    assert without_seconds(json.loads((launch.out / kind / "resumed" / "0.json").read_text())) == without_seconds(
        whole
    )
    assert_close(launch.load(kind, "killed"), launch.load(kind, "whole"), atol=0)


@pytest.mark.parametrize("kind, case", [("single", "refused"), *having("refused")])
def test_checkpoints_without_its_state_are_refused(launch, kind, case):
    for rank in range(1 if kind == "single" else 2):
        said = launch(kind, case, rank)
        assert len(said) == 2
        assert all("no state of EffOPD for this number of processes" in message for message in said)
