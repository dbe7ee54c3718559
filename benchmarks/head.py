"""The loss of the language-model head, forward and backward: this library's beside full logits and TRL's fused head.

Each variant turns `hidden (tokens, hidden)` and the head's weight into a loss and its gradients for both. Variants
alternate in random order; the figure is the ratio of medians, of CPU seconds of one thread, or of the clock on a GPU.
Peak memory is that of a process that runs one variant, beyond what it held before. Prints a table and, with `--json`,
writes one.

    python benchmarks/head.py
    python benchmarks/head.py --vocab 131072 --hidden 512 --frozen_head
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time

import psutil
import torch
from rich.console import Console
from rich.table import Table
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

from trl_lopd.training.head import LogitTransform, Targets, TokenLoss
from trl_lopd.training.objective import divergence_topk, reverse_kl_topk, sampled_loss, teacher_support


class Case:
    def __init__(self, a):
        g = torch.Generator().manual_seed(0)
        n, device = a.tokens, a.device
        self.hidden = torch.randn(n, a.hidden, generator=g).to(device, a.dtype).requires_grad_()
        self.weight = (torch.randn(a.vocab, a.hidden, generator=g) / a.hidden**0.5).to(device, a.dtype)
        self.weight.requires_grad_(not a.frozen_head)
        self.labels = torch.randint(a.vocab, (n,), generator=g).to(device)
        self.teacher = -5 - torch.rand(n, generator=g).to(device)
        topk_ids = torch.rand(n, 4 * a.top_k, generator=g).argsort(-1)[:, : a.top_k].to(device)
        topk_logprobs = -4 - torch.rand(n, a.top_k, generator=g).to(device)
        self.ids, self.support, self.distinct = teacher_support(
            topk_ids, topk_logprobs, self.labels, self.teacher, a.vocab
        )
        self.weights = torch.full((n,), 1 / n, device=device)

    def logprobs(self):
        return torch.nn.functional.linear(self.hidden, self.weight).float().log_softmax(-1)

    def cross_entropy(self):
        return torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(self.hidden, self.weight).float(), self.labels
        )

    def full_sampled(self):
        return sampled_loss(self.logprobs().gather(-1, self.labels.unsqueeze(-1)).squeeze(-1), self.teacher).mean()

    def full_topk(self):
        logprobs = self.logprobs()
        support, tail = logprobs.gather(-1, self.ids), logprobs.scatter(-1, self.ids, -torch.inf).logsumexp(-1)
        return reverse_kl_topk(support, tail, self.support, self.distinct).mean()

    def trl_sampled(self):
        logprobs, *_ = _ChunkedLogProbFunction.apply(
            self.hidden, self.weight, None, self.labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
            ("log_probs", "entropy", "is_top1"),
        )  # fmt: skip
        return sampled_loss(logprobs, self.teacher).mean()

    def ours(self, ids, distinct, loss):
        targets = Targets(self.labels, ids, distinct, self.weights, loss)
        return TokenLoss.apply(self.hidden, self.weight, None, targets, LogitTransform(), True)[0]

    def ours_sampled(self):
        ids = self.labels.unsqueeze(-1)
        loss = lambda logprobs, tail, rows: sampled_loss(logprobs[:, 0], self.teacher[rows])  # noqa: E731
        return self.ours(ids, torch.ones_like(ids, dtype=torch.bool), loss)

    def ours_topk(self, beta=1.0):
        loss = lambda logprobs, tail, rows: divergence_topk(  # noqa: E731
            logprobs, tail, self.support[rows], self.distinct[rows], beta
        )
        return self.ours(self.ids, self.distinct, loss)

    def ours_jsd(self):
        return self.ours_topk(beta=0.5)


VARIANTS = {
    "cross entropy, full logits (SFT)": "cross_entropy",
    "sampled, full logits": "full_sampled",
    "topk, full logits": "full_topk",
    "sampled, TRL's fused head": "trl_sampled",
    "sampled, ours": "ours_sampled",
    "topk, beta 1, ours": "ours_topk",
    "topk, beta 0.5, ours": "ours_jsd",
}


def step(case: Case, name: str) -> float:
    case.hidden.grad = case.weight.grad = None
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
    now = time.perf_counter if case.hidden.is_cuda else time.process_time
    start = now()
    getattr(case, VARIANTS[name])().backward()
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
    return now() - start


def peak_memory(case: Case, name: str) -> float:
    """MiB that a step takes at most, beyond what there is before it."""
    if case.hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(case, name)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(case, name)
    done.set()
    watcher.join()
    return (peak - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--frozen_head", action="store_true", help="no gradient for the head, as with LoRA")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each variant, after an untimed one")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if a.only:
        print(json.dumps({"peak": peak_memory(Case(a), a.only)}))
        return
    memory = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[name] = json.loads(child.stdout.splitlines()[-1])["peak"]
    case, rng = Case(a), random.Random(0)
    times = {name: [] for name in VARIANTS}
    for i in range(a.steps + 1):
        for name in rng.sample(list(VARIANTS), len(VARIANTS)):
            seconds = step(case, name)
            if i:
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    base = median[next(iter(VARIANTS))]
    title = f"{a.device}, {a.dtype}, {a.tokens} tokens, vocabulary {a.vocab}, hidden {a.hidden}, k = {a.top_k}"
    table = Table("loss", "median (s)", "ratio to SFT", "peak memory (MiB)", title=title)
    for name in VARIANTS:
        table.add_row(name, f"{median[name]:.3f}", f"{median[name] / base:.2f}", f"{memory[name]:.0f}")
    Console(width=110).print(table)
    if a.json:
        with open(a.json, "w") as file:
            json.dump({"settings": {k: str(v) for k, v in vars(a).items()}, "s": times, "mib": memory}, file, indent=2)


if __name__ == "__main__":
    main()
