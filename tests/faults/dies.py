"""Runs a module until a directory has so many shards, and dies then: `DIRECTORY SHARDS MODULE ARGUMENTS`."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path


def die(directory: Path, shards: int) -> None:
    while len(list(directory.glob("*.parquet"))) < shards:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=die, args=(Path(sys.argv[1]), int(sys.argv[2])), daemon=True).start()
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
