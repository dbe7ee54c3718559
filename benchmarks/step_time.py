"""One training step of `OfflineOPDTrainer` beside one of TRL's `SFTTrainer`, on the same model and tokens.

Steps of the variants alternate in one process, in random order, so that whatever else the machine does falls on all of
them; the ratio of medians is the result, of CPU seconds of one thread, or of the clock on a GPU. Peak memory is
measured a process a variant. Prints a table and, with `--json`, writes one.

    python benchmarks/step_time.py
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, table_features

VARIANTS = {
    "SFT (TRL)": None,
    "sampled": {"loss_type": "sampled", "columns": ()},
    "sampled, top-k columns there": {"loss_type": "sampled", "columns": ("teacher_topk_ids", "teacher_topk_logprobs")},
    "topk": {"loss_type": "topk", "columns": ("teacher_topk_ids", "teacher_topk_logprobs")},
}


def make_rows(a) -> Dataset:
    """Random tokens and scores: what they are changes nothing about the time."""
    rng = np.random.default_rng(0)
    shape = (a.batch_size, a.completion)
    topk = np.argsort(rng.random((*shape, 4 * a.top_k)), axis=-1)[..., : a.top_k]
    return Dataset.from_dict(
        {
            "prompt_ids": rng.integers(0, a.vocab, (a.batch_size, a.prompt)).tolist(),
            "completion_ids": rng.integers(4 * a.top_k, a.vocab, shape).tolist(),
            "teacher_logprobs": (-5 - rng.random(shape)).tolist(),
            "teacher_fingerprint": ["random@0"] * a.batch_size,
            "teacher_topk_ids": topk.tolist(),
            "teacher_topk_logprobs": (-4 - rng.random(topk.shape)).astype(np.float16).tolist(),
        },
        features=table_features(top_k=a.top_k),
    )


def make_config(a) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        intermediate_size=3 * a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64,
        num_key_value_heads=max(1, a.hidden // 128),
        head_dim=64,
        tie_word_embeddings=True,
    )


def make_trainer(name: str, a, output_dir: str):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(make_config(a)).to(a.dtype)
    rows = make_rows(a)
    common = dict(
        output_dir=output_dir,
        per_device_train_batch_size=a.batch_size,
        activation_checkpointing=False,
        bf16=a.bf16,
        report_to="none",
        use_cpu=a.device == "cpu",
    )
    variant = VARIANTS[name]
    if variant is None:
        sft_rows = Dataset.from_dict({"input_ids": [r["prompt_ids"] + r["completion_ids"] for r in rows]})
        args = SFTConfig(**common, max_length=None)
        return SFTTrainer(model, args, train_dataset=sft_rows, processing_class=make_tokenizer(a.vocab))
    keep = ["prompt_ids", "completion_ids", "teacher_logprobs", "teacher_fingerprint", *variant["columns"]]
    args = OfflineOPDConfig(**common, loss_type=variant["loss_type"], teacher_consistency="off")
    return OfflineOPDTrainer(model, args, rows.select_columns(keep), processing_class=make_tokenizer(a.vocab))


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """The trainers want a vocabulary size and special tokens."""
    vocabulary = models.WordLevel({str(i): i for i in range(size)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), pad_token="0", eos_token="0")


class Stepper:
    def __init__(self, trainer):
        self.trainer = trainer
        self.model = trainer.model.train()
        self.optimizer = trainer.create_optimizer()
        loader = iter(trainer.get_train_dataloader())
        (self.batch,), self.num_items = trainer.get_batch_samples(loader, 1, trainer.args.device)
        trainer.current_gradient_accumulation_steps = 1

    def __call__(self) -> float:
        synchronize(self.model)
        now = time.perf_counter if self.model.device.type == "cuda" else time.process_time
        start = now()
        self.trainer.training_step(self.model, dict(self.batch), self.num_items)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.model)
        return now() - start


def synchronize(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """MiB: of the allocator on a GPU, of the whole process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=480)
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each variant, after 2 untimed ones")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name), help="of the weights")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as tmp:
        if a.only:
            stepper = Stepper(make_trainer(a.only, a, tmp))
            before = peak_memory(a.device)
            for _ in range(3):
                stepper()
            print(json.dumps({"peak": peak_memory(a.device), "before": before}))
            return
        memory = {}
        for name in VARIANTS:
            child = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--only", name], capture_output=True, text=True, check=True
            )
            memory[name] = json.loads(child.stdout.splitlines()[-1])["peak"]
        steppers = {name: Stepper(make_trainer(name, a, tmp)) for name in VARIANTS}
        times = {name: [] for name in VARIANTS}
        rng = random.Random(0)
        for step in range(a.steps + 2):
            # In a fixed order each variant would always find the memory as the same other one left it.
            for name in rng.sample(list(steppers), len(steppers)):
                seconds = steppers[name]()
                if step >= 2:
                    times[name].append(seconds)

    base = next(iter(VARIANTS))
    results = {
        name: {
            "median_s": statistics.median(times[name]),
            "time_ratio": statistics.median(times[name]) / statistics.median(times[base]),
            "peak_mib": memory[name],
            "memory_ratio": memory[name] / memory[base],
        }
        for name in VARIANTS
    }
    title = (
        f"{a.device}, {a.batch_size} x ({a.prompt} + {a.completion}) tokens, vocabulary {a.vocab}, hidden {a.hidden}"
    )
    table = Table("objective", "median step (s)", "ratio to SFT", "peak memory (MiB)", "ratio to SFT", title=title)
    for name, r in results.items():
        table.add_row(
            name, f"{r['median_s']:.3f}", f"{r['time_ratio']:.3f}", f"{r['peak_mib']:.0f}", f"{r['memory_ratio']:.3f}"
        )
    Console(width=110).print(table)
    if a.json:
        with open(a.json, "w") as file:
            json.dump({"settings": {k: str(v) for k, v in vars(a).items()}, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
