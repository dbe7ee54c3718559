"""Sampling and scoring wait for days; what trains after them waits as long as its launch says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ranks
from torch.distributed.constants import default_pg_timeout

SCRIPT = Path(__file__).parent / "timeouts_script.py"


@pytest.mark.slow
def test_sampling_waits_longer_than_the_launch_and_training_does_not(tmp_path, student_dir):
    done = ranks.launch(SCRIPT, student_dir, tmp_path / "out", "short")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"process {rank} has sampled" in done.stdout for rank in range(2))
    assert 2 <= int(re.search(r"gave up after (\d+) s", done.stdout)[1]) <= 6


def test_sampling_leaves_the_default_time_limit(tmp_path, student_dir):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w5"}\n{"prompt": "w6"}\n')
    done = ranks.launch(SCRIPT, student_dir, tmp_path / "out", prompts)
    assert done.returncode == 0, done.stderr[-3000:]
    limit = default_pg_timeout.total_seconds()
    assert all(f"process {rank} waits {limit:.0f} s" in done.stdout for rank in range(2))


def test_processes_that_do_not_know_of_one_another_are_refused(tmp_path, student_dir):
    """Without an accelerator, accelerate takes each for the only one unless it is told to stay on the CPU."""
    words = ["--dataset_name", tmp_path, "--model_name_or_path", student_dir, "--output_dir", tmp_path / "out"]
    done = ranks.launch("-m", "trl_lopd.cli", "rollout", *words)
    assert done.returncode != 0 and "2 processes were launched" in done.stderr and "--use_cpu" in done.stderr
