"""Training on rows of long-tailed lengths: padded, grouped by length, without padding, packed.

Each variant trains one epoch on the same table with about as many rows a step; the figure is trained tokens per second
after the first step, CPU seconds of one thread, or those of the clock on a GPU. Variants run several times, in random
order; medians. On a CPU the attention is sdpa, which builds a dense mask for rows that share a sequence; flash
attention (`--attention flash_attention_2`) does not.

    python benchmarks/packing.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from step_time import make_config, make_tokenizer
from transformers import Qwen3ForCausalLM, TrainerCallback

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, table_features

ROWS_A_STEP = 8


def variants(a) -> dict[str, dict]:
    packs = {"packing": True, "max_length": a.longest, "per_device_train_batch_size": 1}
    return {
        "padded": {},
        "grouped by length": {"train_sampling_strategy": "group_by_length"},
        "padded, max_tokens_per_device": {"max_tokens_per_device": a.longest},
        "padding_free": {"padding_free": True},
        "packing": packs | {"gradient_accumulation_steps": 2},
    }


def make_table(a) -> Dataset:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(a.median), 0.9, a.rows), 8, a.longest - 32).astype(int)
    topk = [np.tile(np.arange(a.top_k), (n, 1)) for n in lengths]
    return Dataset.from_dict(
        {
            "prompt_ids": rng.integers(a.top_k, a.vocab, (a.rows, 32)).tolist(),
            "completion_ids": [rng.integers(a.top_k, a.vocab, n).tolist() for n in lengths],
            "teacher_logprobs": [(-5 - rng.random(n)).tolist() for n in lengths],
            "teacher_fingerprint": ["random@0"] * a.rows,
            "teacher_topk_ids": [ids.tolist() for ids in topk],
            "teacher_topk_logprobs": [(-4 - rng.random(ids.shape)).astype(np.float16).tolist() for ids in topk],
        },
        features=table_features(top_k=a.top_k),
    )


class Clock(TrainerCallback):
    """Seconds and trained tokens after the first step."""

    def __init__(self, now):
        self.now = now

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.start = self.now()
        self.end = self.now()


def run(name: str, a, table: Dataset, directory: str) -> tuple[float, float]:
    """Trained tokens per second, and the share of padding."""

    def now() -> float:
        if a.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    torch.manual_seed(0)
    model = Qwen3ForCausalLM._from_config(make_config(a), attn_implementation=a.attention, dtype=a.dtype)
    options = {
        "per_device_train_batch_size": ROWS_A_STEP,
        "num_train_epochs": 1,
        "activation_checkpointing": False,
        "bf16": False,
        "teacher_consistency": "off",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": a.device == "cpu",
    }
    args = OfflineOPDConfig(f"{directory}/run", **options | variants(a)[name])
    clock = Clock(now)
    trainer = OfflineOPDTrainer(model, args, table, processing_class=make_tokenizer(a.vocab), callbacks=[clock])
    trained = []  # tokens of each step
    count = trainer._get_num_items_in_batch

    def counted(batches, device):
        parts = [part for batch in batches for part in (batch if isinstance(batch, list) else [batch])]
        trained.append(sum(len(part["labels"]) for part in parts))
        return count(batches, device)

    trainer._get_num_items_in_batch = counted
    trainer.train()
    padding = statistics.fmean(log["padding"] for log in trainer.state.log_history if "padding" in log)
    return sum(trained[1:]) / (clock.end - clock.start), padding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--median", type=int, default=100, help="of the completions' lengths")
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write the figures to this file")
    a = parser.parse_args()
    a.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    table, rng, results = make_table(a), random.Random(0), {name: [] for name in variants(a)}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(a.repeats):
            for name in rng.sample(list(results), len(results)):
                results[name].append(run(name, a, table, directory))
    show = Table(
        "", "trained tokens/s", "ratio to padded", "padding", title=f"{a.device}, {a.attention}, {a.rows} rows"
    )
    speed = {name: statistics.median(tokens for tokens, _ in values) for name, values in results.items()}
    for name, values in results.items():
        show.add_row(name, f"{speed[name]:,.0f}", f"{speed[name] / speed['padded']:.2f}", f"{values[0][1]:.0%}")
    Console(width=100).print(show)
    if a.json:
        with open(a.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
