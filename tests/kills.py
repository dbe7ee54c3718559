"""Runs into a directory while somebody kills them again and again.

As a script it is the somebody, and forks the runs that are killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import datasets
import ranks
from accelerate import PartialState

from trl_lopd import collect_rollouts, load_table, score_rollouts
from trl_lopd.identity.cards import record_of


def score(out: str, rollouts: str, teacher: str, student: str) -> datasets.Dataset:
    rows = datasets.load_from_disk(rollouts)
    return score_rollouts(
        rows, teacher, output_dir=out, top_k=3, ref_model=student, rows_per_shard=1, max_batch_tokens=64
    )


def score_several(out: str, rollouts: str, math: str, code: str) -> datasets.Dataset:
    rows = datasets.load_from_disk(rollouts)
    teachers = {"math": math, "code": code}
    return score_rollouts(rows, teachers, output_dir=out, top_k=3, rows_per_shard=2, max_batch_tokens=64)


def sample(out: str, prompts: str, student: str) -> datasets.Dataset:
    return collect_rollouts(
        datasets.load_from_disk(prompts),
        student,
        output_dir=out,
        num_generations=2,
        max_completion_length=6,
        truncated="drop",
        rows_per_shard=1,
    )


JOBS = {"score": score, "score_several": score_several, "sample": sample}


def check(job: str, processes: int, directory: Path, *args: str, kills: int = 6) -> None:
    """A run that was killed `kills` times ends in the table of one that was not, byte for byte."""
    JOBS[job](str(directory / "whole"), *args)
    done = ranks.launch(__file__, job, processes, kills, directory / "killed", *args, processes=None, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    at = [int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("killed with")]
    shards = sorted((directory / "whole").glob("*.parquet"))
    # Killed in the middle, not before or after.
    assert len(at) == kills and len(set(at)) >= 4 and at[0] < len(shards)
    whole, killed = (load_table(directory / name, split="train") for name in ("whole", "killed"))
    assert killed.to_dict() == whole.to_dict() and record_of(killed) == record_of(whole)
    for file in shards:
        assert (directory / "killed" / file.name).read_bytes() == file.read_bytes()


def run(rank: int, processes: int, port: int, job: str, *args: str) -> None:
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        PartialState(cpu=True, backend="gloo")
    JOBS[job](*args)


def start(processes: int, *args: str) -> list[int]:
    port = ranks.free_port()
    children = []
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                run(rank, processes, port, *args)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    return children


def shards_done(out: str) -> int:
    # With those of the parts, if several teachers score.
    return len([*Path(out).glob("*.parquet"), *Path(out).glob(".trl_lopd/parts/*/*.parquet")])


if __name__ == "__main__":
    job, (processes, kills), out = sys.argv[1], map(int, sys.argv[2:4]), sys.argv[4]
    datasets.disable_progress_bars()
    rng = random.Random(processes)
    for _ in range(kills):
        enough = shards_done(out) + rng.randint(1, 8)
        children = start(processes, job, *sys.argv[4:])
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.0, 0.3))  # while it starts
        else:
            deadline = time.monotonic() + 30
            while shards_done(out) < enough and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.02))
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)
        print("killed with", shards_done(out), "shards", flush=True)
    children = start(processes, job, *sys.argv[4:])
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(max(codes))
