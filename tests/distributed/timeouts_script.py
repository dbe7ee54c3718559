"""Sampling, by the command line or in a launch whose processes wait less for one another than sampling takes."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch
from accelerate import PartialState

import trl_lopd.generation.rollouts
from trl_lopd import cli

SECONDS = 3
fingerprint_teacher = trl_lopd.generation.rollouts.fingerprint_teacher


def fingerprint_slowly(*args, **kwargs):
    time.sleep(2 * SECONDS)
    return fingerprint_teacher(*args, **kwargs)


if __name__ == "__main__":
    student, output_dir, mode = sys.argv[1:]
    if mode == "short":
        PartialState(cpu=True, timeout=timedelta(seconds=SECONDS))
        trl_lopd.generation.rollouts.fingerprint_teacher = fingerprint_slowly
        trl_lopd.collect_rollouts(["w5", "w6"], student, output_dir=output_dir, max_completion_length=2)
        rank = PartialState().process_index
        print(f"process {rank} has sampled", flush=True)
        start = time.monotonic()
        try:
            if rank == 1:
                # As training does: one process waits for another, which does not come.
                torch.distributed.all_reduce(torch.zeros(1))
        except RuntimeError:
            print(f"gave up after {time.monotonic() - start:.0f} s", flush=True)
        else:
            time.sleep(3 * SECONDS)
    else:
        options = ["--model_name_or_path", student, "--output_dir", output_dir, "--max_completion_length", "2"]
        assert cli.main(["rollout", "--use_cpu", "--dataset_name", mode, *options]) == 0
        timeout = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
        print(f"process {PartialState().process_index} waits {timeout.total_seconds():.0f} s", flush=True)
