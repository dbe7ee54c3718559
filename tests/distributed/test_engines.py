"""Every engine, really launched on two processes, against one process: the same losses, weights and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launcher import Launcher, parameters
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny import make_rollouts
from transformers import AutoModelForCausalLM

from trl_lopd import score_rollouts

SCRIPT = Path(__file__).parent / "engines_script.py"

# Objectives, aggregations and rows without padding on one engine: what they change comes before the engines.
ALL = ["whole", "sampled_token", "topk_token", "sampled_sequence", "padding_free", "lora", "bf16", "best"]
ALL += ["other_logits"]
SHARDED = ["whole", "sampled_token", "lora", "bf16", "best", "other_logits"]
TORCH = {"ddp": ALL, "fsdp2": SHARDED}
ZERO = {
    "zero1": ["whole"],
    "zero2": ["whole", "bf16"],
    # Every parameter of a tiny model is below the size at which ZeRO-3 begins to shard by default.
    "zero3": SHARDED,
    "zero3-offload": ["whole"],
}


def only(cases, kinds):
    return {kind: [case for case in those if case in cases] for kind, those in kinds.items()}


GROUPS = {
    "single": {"single": [case for case in ALL if case != "bf16"]},
    "torch": only(set(ALL) - {"bf16"}, TORCH),
    "torch bf16": only(["bf16"], TORCH),
    "zero": ZERO,
    "torch again": dict.fromkeys(TORCH, ["resumed"]),
    "zero again": {kind: ["resumed"] for kind in ZERO if kind != "zero3-offload"},
    "offload again": {"zero3-offload": ["resumed"]},
    "alone": dict.fromkeys(TORCH, ["resumed_alone"]),
}

# The others: the whole on every engine but offloading, and what engines do otherwise on one or two of them.
SLOW = {(kind, case) for kind in ("fsdp2", "zero3") for case in ("sampled_token", "best")}
SLOW |= {(kind, case) for kind in ("single", "ddp") for case in ("topk_token", "sampled_sequence")}
SLOW |= {
    ("zero3", "lora"),
    ("fsdp2", "lora"),
    ("fsdp2", "other_logits"),
    ("fsdp2", "resumed_alone"),
    ("zero3-offload", "whole"),
}
SLOW |= {(kind, "bf16") for kind in ("ddp", "fsdp2", "zero2")}
SLOW |= {(kind, "resumed") for kind in ("zero1", "zero2", "zero3-offload")}

pytestmark = pytest.mark.filterwarnings("ignore")


def having(*cases):
    return parameters(
        [(kind, case) for kind, those in (TORCH | ZERO).items() for case in those if case in cases], SLOW
    )


@pytest.fixture(autouse=True)
def needs(request):
    if "zero" in str(request.node.callspec.params["kind"]):
        pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def launch(tmp_path_factory, teacher_dir, student_dir):
    """85 ragged rows, more than six steps of eight: no batch is repeated."""
    path = tmp_path_factory.mktemp("engines")
    table = score_rollouts(make_rollouts(85), str(teacher_dir), top_k=4, ref_model=str(student_dir))
    table.save_to_disk(path / "rows")
    return Launcher(SCRIPT, student_dir, path / "rows", path / "out", groups=GROUPS, slow=SLOW)


def steps(history):
    return [entry for entry in history if "loss" in entry]


def assert_same_log(found, expected, *, rel, absolute):
    """Every metric of every step and of both evaluations, but times, and epochs, which are counted in batches."""
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if not name.endswith(("_runtime", "_per_second", "_preparation_time", "flos", "epoch")):
                assert a[name] == pytest.approx(value, rel=rel, abs=absolute), (a["step"], name)


def assert_same_weights(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("kind, case", having(*ALL[:6]))
def test_is_what_one_process_does(launch, student_dir, kind, case):
    """
    One process, four batches of two rows a step, against two processes, two batches each; Adam, float32.

    The same sums are added in another order: gradients differ by units of float32 rounding, 6e-8 of their size, and
    losses near 1 by a few 1e-7. Adam divides by the running size of a gradient, so where gradients vanish that
    rounding is not small beside them; with the epsilon of these tests, 1e-3, and as large a learning rate, a step
    moves a weight by no more than the gradient. 2e-6 is a five-hundredth of what one step can move a weight. Metrics
    such as the mean importance weight sum exponentials over tokens, and lose a digit more.
    """
    expected = launch("single", case)
    assert_same_log(launch(kind, case), expected, rel=1e-5, absolute=1e-5)
    weights = launch.load("single", case)
    assert_same_weights(launch.load(kind, case), weights, atol=2e-6)
    start = load_file(student_dir / "model.safetensors")
    assert case == "lora" or max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3


@pytest.mark.parametrize("kind, case", having("bf16"))
def test_bf16_stays_near_float32(launch, kind, case):
    """
    A logit of 2 to 4 has a rounding unit of 2^-7 in bfloat16, eight thousandths, and losses are means over tokens
    whose roundings differ in sign. A step that were lost, or taken twice, would show as more.
    """
    for a, b in zip(steps(launch(kind, case)), steps(launch("single", "whole")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2**-7)


@pytest.mark.parametrize("kind, case", [("single", "other_logits"), *having("other_logits")])
def test_a_model_whose_logits_cannot_be_rebuilt_is_refused(launch, kind, case):
    message, step = launch(kind, case)
    assert "`LlamaForCausalLM` cannot be trained here" in message.replace("FSDP", "") and step == 0


@pytest.mark.parametrize("kind, case", parameters([(kind, "resumed") for kind in [*TORCH, *ZERO]], SLOW))
def test_resumes_in_a_new_launch_as_if_it_had_not_stopped(launch, kind, case):
    whole = launch(kind, "whole")
    resumed = launch(kind, case)
    assert [entry["step"] for entry in steps(resumed)] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(steps(resumed), steps(whole), strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    assert_same_weights(launch.load(kind, "resumed"), launch.load(kind, "whole"), atol=0)


@pytest.mark.parametrize("kind, case", parameters([(kind, "resumed_alone") for kind in TORCH], SLOW))
def test_two_processes_are_resumed_on_one(launch, kind, case):
    """As close as the engines are to one process: the second half is one."""
    whole = launch(kind, "whole")
    resumed = launch(kind, case)
    assert [entry["loss"] for entry in steps(resumed)] == pytest.approx(
        [entry["loss"] for entry in steps(whole)], abs=1e-5
    )
    assert_same_weights(launch.load(kind, "resumed_alone"), launch.load(kind, "whole"), atol=2e-6)


@pytest.mark.parametrize("kind, case", having("whole", "lora"))
def test_save_model_writes_a_plain_directory(launch, kind, case):
    launch(kind, case)
    directory, loader = launch.out / kind / case / "model", AutoModelForCausalLM
    if case == "lora":
        loader = AutoPeftModelForCausalLM
        assert (directory / "adapter_model.safetensors").is_file()
    assert (directory / "README.md").is_file() and (directory / "tokenizer.json").is_file()
    loaded = dict(loader.from_pretrained(directory).named_parameters())
    for name, value in launch.load(kind, case).items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("kind, case", having("best"))
def test_loads_the_best_model_at_the_end(launch, kind, case):
    evaluated, metric = launch(kind, case)
    assert evaluated == pytest.approx(metric, rel=1e-6)
    assert metric == pytest.approx(launch("single", case)[1], rel=1e-5)
    saved = load_file(launch.out / kind / case / "model" / "model.safetensors")
    # Those of step 2, kept when they were saved.
    assert_same_weights(saved, launch.load(kind, case), atol=0)
