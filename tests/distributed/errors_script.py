"""Errors that the main process alone meets: each process says what it caught, or lets it end the process."""

from __future__ import annotations

import sys

import httpx
from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError
from tiny import make_rollouts, make_tokenizer

import trl_lopd
from trl_lopd.processes import on_main_process, processes


def missing_weights(directory):
    trl_lopd.score_rollouts(make_rollouts(), f"{directory}/empty", processing_class=make_tokenizer())


def no_server(directory):
    server = trl_lopd.VLLMServer("http://127.0.0.1:9", max_retries=0)
    trl_lopd.score_rollouts(make_rollouts(), server, output_dir=f"{directory}/scores")


def used_directory(directory):
    trl_lopd.collect_rollouts(["w5"], f"{directory}/student", output_dir=directory)


def invalid_stream(directory):
    rows = make_rollouts()
    rows = rows.add_column("teacher_logprobs", [[0.5] * len(ids) for ids in rows["completion_ids"]])
    rows = rows.add_column("teacher_fingerprint", ["x"] * len(rows))
    args = trl_lopd.OfflineOPDConfig(f"{directory}/out", bf16=False, report_to="none", use_cpu=True, max_steps=1)
    trl_lopd.OfflineOPDTrainer(f"{directory}/student", args, rows.to_iterable_dataset())


def hub(directory):
    response = httpx.Response(500, request=httpx.Request("GET", "https://huggingface.co/api"))
    raise HfHubHTTPError("500 Server Error", response=response)


def undecodable(directory):
    b"\xff".decode()


def of_a_library(directory):
    class Unheard(KeyError):
        def __init__(self, key, *, where):
            super().__init__(key)
            self.where = where

    raise Unheard("what", where=sys.stderr)


CASES = {
    **{case.__name__: case for case in (missing_weights, no_server, used_directory, invalid_stream)},
    **{
        case.__name__: lambda directory, case=case: on_main_process(processes(), lambda: case(directory))
        for case in (hub, undecodable, of_a_library)
    },
}

if __name__ == "__main__":
    directory, mode, *cases = sys.argv[1:]
    state = PartialState(cpu=True)
    for case in cases:
        try:
            CASES[case](directory)
        except Exception as error:
            if mode == "raise":
                raise
            ours = isinstance(error, getattr(trl_lopd, "OfflineOPDError", ()))
            print(f"\n{case}|{state.process_index}|{type(error).__name__}|{ours}|{str(error)[:60]!r}", flush=True)
