"""Scores a table into a directory while somebody kills it again and again; `test_scoring.py` runs it.

Imports take seconds and a run takes one, so one process imports everything and forks the runs that are killed.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time

import datasets
from accelerate import PartialState

from trl_lopd import score_rollouts


def run(rank: int, processes: int, port: int, rollouts: str, teacher: str, student: str, out: str) -> None:
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        PartialState(cpu=True, backend="gloo")
    rows = datasets.load_from_disk(rollouts)
    score_rollouts(rows, teacher, output_dir=out, top_k=3, ref_model=student, rows_per_shard=1, max_batch_tokens=64)


def start(processes: int, *args: str) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    return sum(name.endswith(".parquet") for name in os.listdir(out)) if os.path.isdir(out) else 0


if __name__ == "__main__":
    processes, kills, seed = map(int, sys.argv[1:4])
    out = sys.argv[-1]
    datasets.disable_progress_bars()
    rng = random.Random(seed)
    for _ in range(kills):
        enough = shards_done(out) + rng.randint(1, 8)
        children = start(processes, *sys.argv[4:])
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.0, 0.3))  # while it starts
        else:
            deadline = time.monotonic() + 10
            while shards_done(out) < enough and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0.0, 0.02))
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)
        print("killed with", shards_done(out), "shards", flush=True)
    children = start(processes, *sys.argv[4:])
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(max(codes))
