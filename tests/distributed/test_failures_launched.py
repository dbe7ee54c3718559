"""One of two processes fails: all end within seconds, with its message. SIGTERM saves a checkpoint to go on from."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
from datasets import Dataset, load_from_disk
from tiny import make_rollouts

from trl_lopd import score_rollouts

SCRIPT = Path(__file__).parent / "failures_script.py"
# From what happened to the end of the launcher. A hang would last until gloo's timeout of half an hour.
SECONDS = 60


@pytest.fixture(scope="module")
def rows(tmp_path_factory, teacher_dir):
    path = tmp_path_factory.mktemp("tables") / "rows"
    score_rollouts(make_rollouts(40), str(teacher_dir), top_k=4).save_to_disk(path)
    return path


def launch(engine, what, student, rows, out, torchrun=False):
    if "zero" in engine:
        pytest.importorskip("deepspeed")
    words = [str(word) for word in (SCRIPT, engine, what, student, rows, out)]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
        env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CI": "true"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    else:
        done = ranks.launch(*words)
    happened = re.search(r"HAPPENS AT ([\d.]+)", done.stdout)
    assert happened is None or time.time() - float(happened[1]) < SECONDS
    return done


def losses(done):
    return dict(re.findall(r"step (\d+) loss ([\d.]+)", done.stdout))


@pytest.mark.parametrize("engine", ["zero3", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ddp", "fsdp2"))])
def test_a_loss_that_is_nan_on_one_process_stops_all_before_the_step(tmp_path, student_dir, rows, engine):
    done = launch(engine, "nan", student_dir, rows, tmp_path)
    assert done.returncode != 0 and "TRAINED" not in done.stdout
    # Whichever process ends first and whosever output is read: they all say it.
    for rank in range(2):
        message = rf"\[rank{rank}\]: FloatingPointError: The loss of step 3 is nan on process 1.*learning_rate"
        assert re.search(message, done.stderr), done.stderr[-3000:]
    # Saved after every step, and not after that one.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "nonfinite_batch_rank0.json").exists()
    found = json.loads((tmp_path / "nonfinite_batch_rank1.json").read_text())
    assert (found["step"], found["rank"], len(found["sequences"])) == (3, 1, 2)
    table = load_from_disk(rows)
    for sequence in found["sequences"]:
        assert sequence["loss"] == "nan" and sequence["rows"]
        for row in sequence["rows"]:
            assert table[row]["prompt_ids"] + table[row]["completion_ids"] == sequence["input_ids"]


def test_memory_that_runs_out_on_one_process_is_explained(tmp_path, student_dir, rows):
    done = launch("zero3", "memory", student_dir, rows, tmp_path)
    assert done.returncode != 0 and "TRAINED" not in done.stdout
    assert "[rank1]: RuntimeError: [enforce fail" in done.stderr and "can't allocate memory" in done.stderr
    advice = r"\[rank1\]: \(Process 1, after 1 steps; the last batch had 2 x \d+ tokens.*per_device_train_batch_size"
    assert re.search(advice, done.stderr), done.stderr[-3000:]


def test_a_bad_row_that_one_process_reads_is_named(tmp_path, student_dir, rows):
    table = load_from_disk(rows)
    bad = table.to_list()
    bad[7]["teacher_logprobs"][0] = float("nan")
    Dataset.from_list(bad, features=table.features).save_to_disk(tmp_path / "rows")
    done = launch("ddp", "row", student_dir, tmp_path / "rows", tmp_path / "out")
    assert done.returncode != 0 and "TRAINED" not in done.stdout
    assert re.search(
        r"\[rank1\]: trl_lopd\.[\w.]*TableError: Row 3, column `teacher_logprobs`, token 0: nan", done.stderr
    )


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_sigterm_saves_a_checkpoint_from_which_training_goes_on_exactly(tmp_path, student_dir, rows, engine):
    whole = launch(engine, "nothing", student_dir, rows, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = launch(engine, "sigterm", student_dir, rows, tmp_path / "out", torchrun=True)
    assert killed.returncode != 0 and "TRAINED" not in killed.stdout
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert not (tmp_path / "out" / "final").exists()
    step = int(checkpoint.name.split("-")[1])
    assert 2 <= step < 8  # batches are read one ahead
    resumed = launch(engine, "sigterm_resumed", student_dir, rows, tmp_path / "out")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(killed) | losses(resumed) == losses(whole)
    assert list(losses(resumed)) == [str(i) for i in range(step + 1, 9)]
