"""A table of another teacher stops every process of a launch, before weights are loaded, with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from tiny import make_model, make_rollouts

from trl_lopd import score_rollouts

SCRIPT = Path(__file__).parent / "refusal_script.py"
CONFIG = Path(__file__).parents[2] / "accelerate_configs" / "zero3.yaml"

OPTIONS = ("--bf16", "False", "--report_to", "none", "--use_cpu", "True", "--output_dir")


@pytest.fixture(scope="module")
def other_table(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("tables") / "other"
    score_rollouts(make_rollouts(8), make_model(seed=9), processing_class=tokenizer, top_k=2).save_to_disk(path)
    return path


# By the launcher itself; below, in processes that need not import everything first.
@pytest.mark.slow
def test_a_mismatch_stops_all_processes_of_a_launch_with_one_message(tmp_path, student_dir, other_table):
    pytest.importorskip("deepspeed")
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)),
        *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
        *(str(SCRIPT), str(student_dir), str(other_table), "raise", *OPTIONS),
    ]
    env = os.environ | {"CI": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # A hang is what the limit is for; nearly all of the time goes into imports.
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=180, env=env)
    assert_refused(done)


def assert_refused(done):
    assert done.returncode != 0
    assert "A MODEL WAS LOADED" not in done.stdout
    assert done.stderr.count("Teacher mismatch") == 1, done.stderr[-3000:]


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "zero3"])
def test_a_mismatch_stops_all_processes_with_one_message(tmp_path, student_dir, other_table, engine):
    words = [student_dir, other_table, "raise", *OPTIONS, tmp_path]
    if engine == "zero3":
        pytest.importorskip("deepspeed")
        auto = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
        (tmp_path / "ds.json").write_text(json.dumps(auto | {"zero_optimization": {"stage": 3}}))
        words += ["--deepspeed", tmp_path / "ds.json"]
    assert_refused(ranks.launch(SCRIPT, *words))


def test_every_process_can_catch_it(tmp_path, student_dir, other_table):
    done = ranks.launch(SCRIPT, student_dir, other_table, "catch", *OPTIONS, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for process in range(2):
        assert f"process {process} of 2 caught: Teacher mismatch" in done.stdout


def test_the_right_table_is_accepted(tmp_path, student_dir, table):
    table.save_to_disk(tmp_path / "table")
    done = ranks.launch(SCRIPT, student_dir, tmp_path / "table", "raise", *OPTIONS, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("A MODEL WAS LOADED") == 2
