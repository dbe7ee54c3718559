"""Scoring by a vLLM server: nothing is lost, its memory, and its speed beside the local teacher's.

Serves a random model, scores the same long rows with `VLLMServer` at several `max_concurrency`, and holds all scores
against the local teacher's, in one run. Memory is that of all processes of the server (Linux), beyond what they have
when it has started. A server with other limits is a process of its own.

    make test-vllm   # installs vLLM into .venv-vllm
    python benchmarks/scoring_server.py
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from trl_lopd import VLLMServer
from trl_lopd.generation.teachers import LocalTeacher


def make_model(a, directory: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        intermediate_size=3 * a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 32,
        max_position_embeddings=a.longest + 1,  # the server has to sample a token
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def make_rows(a) -> tuple[list[np.ndarray], list[int]]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, a.vocab, rng.integers(a.longest // 2, a.longest + 1)) for _ in range(a.rows)]
    return rows, [len(row) // 2 for row in rows]


def rss(process: psutil.Process) -> float:
    """MiB of a process and all that it started."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total / 2**20


@contextmanager
def running_server(a, model: Path, batched_tokens: int):
    """Yields its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [a.vllm, "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--enforce-eager", "--skip-tokenizer-init", "--max-num-batched-tokens", str(batched_tokens)]
    command += ["--max-num-seqs", "64"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with open(model / "server.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        else:
            raise SystemExit((model / "server.log").read_text()[-3000:])
        yield url, psutil.Process(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def peak_memory(process: psutil.Process):
    """Yields a list whose one entry is the most memory that there was."""
    peak, done = [rss(process)], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], rss(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def timed(score, *args) -> tuple[list, float]:
    start = time.perf_counter()
    return score(*args), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm", help="the program that serves")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a row; the shortest have half")
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--max_concurrency", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--max_num_batched_tokens", type=int, nargs="*", default=[4096, 512], help="of the server")
    a = parser.parse_args()

    sequences, lengths = rows = make_rows(a)
    tokens = sum(map(len, sequences))
    title = f"{a.rows} rows, {tokens:,} tokens, vocabulary {a.vocab:,}, top_k {a.top_k}, float32"
    table = Table(
        "scored by", "max_concurrency", "speed, of the local one's", "most memory beyond idle (MiB)", title=title
    )
    with tempfile.TemporaryDirectory() as directory:
        local = LocalTeacher(make_model(a, Path(directory)), 4096)
        local.score(sequences[:2], lengths[:2], a.top_k)
        expected, local_s = timed(local.score, *rows, a.top_k)
        table.add_row("local teacher", "", f"1 ({tokens / local_s:,.0f} tokens/s)", "")
        for batched_tokens in a.max_num_batched_tokens:
            with running_server(a, Path(directory), batched_tokens) as (url, process):
                # What it compiles and allocates once.
                VLLMServer(url).score([row[:16] for row in sequences[:2]], [8, 8], a.top_k)
                idle = rss(process)
                for concurrency in a.max_concurrency:
                    client = VLLMServer(url, max_concurrency=concurrency)
                    with peak_memory(process) as peak:
                        scores, seconds = timed(client.score, *rows, a.top_k)
                    for ours, theirs in zip(scores, expected, strict=True):
                        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-3, rtol=0)
                    name = f"vLLM, --max-num-batched-tokens {batched_tokens}"
                    measured = str(concurrency), f"{local_s / seconds:.2f}", f"{peak[0] - idle:,.0f}"
                    table.add_row(name, *measured)
                    print(name, *measured, flush=True)  # a run takes minutes
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
