"""Really launched processes against one: the same global batch gives the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_rollouts
from safetensors.torch import load_file

from trl_lopd import score_rollouts

SCRIPT = Path(__file__).parent / "script.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory, teacher_dir, student_dir):
    """85 ragged rows: one epoch holds all ten steps, and the last evaluation batch repeats rows across processes."""
    path = tmp_path_factory.mktemp("tables") / "rows"
    score_rollouts(make_rollouts(85), str(teacher_dir), top_k=4, ref_model=str(student_dir)).save_to_disk(path)
    return path


def launch(processes, student, rows, out, **options):
    launcher = ["--multi_gpu"] if processes > 1 else ["--cpu"]  # `--cpu` ignores `--num_processes`
    options = {
        "output_dir": out,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "max_steps": 10,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 4 // processes,
        "use_cpu": True,
    } | options
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", str(processes)),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
        *(str(SCRIPT), str(student), str(rows)),
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"CI": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result["processes"] == processes
    return result, load_file(out / "model.safetensors")


@pytest.mark.parametrize("loss_type", ["topk", "sampled"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_two_processes_equal_one(tmp_path, student_dir, rows, loss_type, aggregation):
    """1 process x 4 accumulation steps against 2 processes x 2, ten steps of Adam, float32.

    The same sums are added in another order, so each gradient differs by a few units of float32 rounding (6e-8 of its
    size). Adam divides a gradient by its own running size: where gradients are near zero, that rounding is not small
    beside them, and a weight can move differently by a share of the learning rate. 1e-4 is a hundredth of what ten
    steps at 1e-3 can move a weight; a wrong normalisation or a lost batch moves nearly all weights by more.
    """
    options = {"loss_type": loss_type, "loss_aggregation": aggregation}
    one, weights = launch(1, student_dir, rows, tmp_path / "one", **options)
    two, weights_two = launch(2, student_dir, rows, tmp_path / "two", **options)
    assert weights.keys() == weights_two.keys()
    start = load_file(Path(student_dir) / "model.safetensors")
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 5e-3
    for name in weights:
        torch.testing.assert_close(
            weights_two[name], weights[name], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n} {m}"
        )

    logs = [[x for x in result["history"] if "loss" in x] for result in (one, two)]
    assert len(logs[0]) == 10
    for a, b in zip(*logs, strict=True):
        for name in ("loss", "huber", "reverse_kl_topk", "entropy", "importance_weight/max", "advantage/std"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), (a["step"], name)
    for name, value in one["eval"].items():
        if not name.endswith(("runtime", "per_second", "epoch", "preparation_time")):
            assert two["eval"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
