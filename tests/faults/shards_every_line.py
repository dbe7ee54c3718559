"""Kills a job at every line of `shards.py` that it executes, each in a process of its own, and resumes it each time.

`python shards_every_line.py DIRECTORY` prints how many lines that were.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pyarrow as pa

import trl_lopd.table.store
from trl_lopd.table.store import ShardStore

SHARDS = 2


def compute(shard: int) -> pa.Table:
    return pa.table({"row": pa.array([shard] * 3, pa.int32())})


def work(directory: Path) -> None:
    with ShardStore(directory, pins={}, rows=SHARDS, rows_per_shard=1) as store:
        for shard in store.pending:
            store.write(shard, compute(shard), rows=3)


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.parquet")}


def killed_at(line: int, directory: Path) -> bool:
    """Whether the job has that many lines; if so it was killed there."""
    if (pid := os.fork()) == 0:
        left = line

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename != trl_lopd.table.store.__file__:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work(directory)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"line {line}: status {status}"
    return status == signal.SIGKILL


if __name__ == "__main__":
    # What a process has written outlives it without; only a power cut is different.
    os.fsync = lambda descriptor: None
    root = Path(sys.argv[1])
    assert not killed_at(sys.maxsize, root / "reference")
    reference = shards(root / "reference")
    assert len(reference) == SHARDS
    line = 0
    while killed_at(line := line + 1, root / str(line)):
        directory = root / str(line)
        # Whole or not there.
        assert shards(directory).items() <= reference.items(), f"line {line}"
        work(directory)
        assert shards(directory) == reference, f"line {line}"
        assert not list(directory.rglob("*.tmp")), f"line {line}"
        with ShardStore(directory, pins={}, rows=SHARDS, rows_per_shard=1) as store:
            assert store.pending == [] and store.counts() == {"rows": 3 * SHARDS}, f"line {line}"
    print(line - 1)
