"""A long job in small, to be killed: `python shards_job.py DIRECTORY PROCESS_INDEX NUM_PROCESSES PAUSE`.

It says that it is ready, waits for a line on its standard input, enters the store, says so, and writes shards with
random pauses between them of `PAUSE` seconds at most.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from trl_lopd.table.store import ShardStore

ROWS, ROWS_PER_SHARD, NUM_SHARDS = 191, 4, 48


def output_rows(row: int) -> int:
    """How many rows come out of an input row: the sixth shard is empty."""
    return 0 if row // ROWS_PER_SHARD == 5 else row * 7 % 4


def compute(span: range) -> pa.Table:
    rows = np.array([row for row in span for _ in range(output_rows(row))], np.int32)
    lengths = rows % 50
    rng = np.random.default_rng(span.start)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    inner = pa.array(np.arange(0, 4 * lengths.sum() + 1, 4), pa.int32())
    scores = pa.ListArray.from_arrays(inner, pa.array(rng.standard_normal(4 * lengths.sum()).astype(np.float16)))
    return pa.table({"row": pa.array(rows), "scores": pa.ListArray.from_arrays(offsets, scores)})


def open_store(directory: str | Path, process_index: int = 0, num_processes: int = 1) -> ShardStore:
    return ShardStore(
        directory,
        pins={"seed": 0},
        rows=ROWS,
        rows_per_shard=ROWS_PER_SHARD,
        process_index=process_index,
        num_processes=num_processes,
    )


def work(store: ShardStore, pause: float = 0.0, limit: int | None = None) -> None:
    """Writes what is pending, `limit` shards at most."""
    for shard in store.pending[:limit]:
        time.sleep(random.uniform(0, pause))
        span = store.span(shard)
        store.write(shard, compute(span), inputs=len(span), dropped=sum(output_rows(row) == 0 for row in span))


if __name__ == "__main__":
    # Once for what is imported on first use.
    compute(range(1))
    print("ready", flush=True)
    sys.stdin.readline()
    with open_store(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) as store:
        print("entered", flush=True)
        work(store, float(sys.argv[4]))
