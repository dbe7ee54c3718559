"""Fills a small disk: `python shards_full_disk.py DIRECTORY`, the directory on a file system of less than 1 MB."""

from __future__ import annotations

import sys
from pathlib import Path

from shards_job import NUM_SHARDS, open_store, work

from trl_lopd.table.store import ShardError

disk = Path(sys.argv[1])
with open_store(disk / "out") as store:
    work(store, limit=3)
    with open(disk / "full", "wb", buffering=0) as file:
        # Room for a few shards, not for all.
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - 8 * 4096)
    try:
        work(store)
        raise AssertionError("the disk was not full")
    except ShardError as error:
        safe = NUM_SHARDS - len(store.pending)
        assert f"{safe} of {NUM_SHARDS} shards are safe" in str(error), error
        assert 3 <= safe < NUM_SHARDS
    assert not list((disk / "out").rglob("*.tmp"))
(disk / "full").unlink()
with open_store(disk / "out") as store:
    assert len(store.pending) == NUM_SHARDS - safe
    work(store)
with open_store(disk / "out") as store:
    assert store.pending == []
