"""Memory and time of each stage as rows get longer: sampling, scoring, reading, training and the report.

A Qwen3-shaped model with random weights and two layers, `--rows` rows of each length, every stage and length in a
process of its own. Memory is the peak of the stage beyond what the process held before it (resident, `VmHWM`), so that
a stage whose memory grows with the square of the length shows itself. Training is one step with checkpointed
activations.

    python benchmarks/long_rows.py
    python benchmarks/long_rows.py --lengths 1024 8192 --stages scoring report
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from fingerprint_speed import memory_mib
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_lopd import (
    OfflineOPDConfig,
    OfflineOPDTrainer,
    collect_rollouts,
    score_rollouts,
    write_report,
)
from trl_lopd.table.schema import TableRows
from trl_lopd.training.collator import OfflineOPDCollator

PROMPT, TOP_K = 64, 8


def make_model(directory: Path, vocab: int, longest: int) -> str:
    """Saves a model with a tokenizer; it is the student and the teacher."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2 * longest,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i} ": i for i in range(vocab)}, unk_token="w0 "))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0 ", eos_token="w1 ").save_pretrained(directory)
    return str(directory)


def rollouts_of(rows: int, length: int, vocab: int) -> Dataset:
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(2, vocab, size).astype(np.int32)  # noqa: E731
    return Dataset.from_dict(
        {
            "prompt_ids": [draw(PROMPT) for _ in range(rows)],
            "completion_ids": [draw(length) for _ in range(rows)],
        }
    )


def prepare(stage: str, model: str, length: int, a) -> Callable[[], object]:
    """Prepares a stage, and returns what is measured of it."""
    if stage == "sampling":
        prompts = [" ".join(f"w{i}" for i in range(2, 2 + PROMPT))] * a.rows
        loaded = Qwen3ForCausalLM.from_pretrained(model)
        loaded.generation_config.eos_token_id = None  # nothing ends before it is as long as wanted
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        return lambda: collect_rollouts(prompts, loaded, processing_class=tokenizer, max_completion_length=length)
    rollouts = rollouts_of(a.rows, length, a.vocab)
    if stage == "scoring":
        return lambda: score_rollouts(rollouts, model, top_k=TOP_K)
    table = score_rollouts(rollouts, model, top_k=TOP_K, ref_model=model)
    if stage == "collating":
        rows = TableRows(table)
        return lambda: OfflineOPDCollator(pad_token_id=0)(rows.__getitems__(list(range(a.rows))))
    run = f"{model}-run"
    packed = {"packing": True, "max_length": PROMPT + length} if stage == "training, packed" else {}
    args = OfflineOPDConfig(
        run,
        max_steps=1,
        per_device_train_batch_size=1 if packed else a.rows,
        max_completion_length=length,
        teacher_consistency="off",
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **packed,
    )
    trainer = OfflineOPDTrainer(model, args, table)
    if stage != "report":
        return trainer.train
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    table.save_to_disk(f"{run}/table")
    return lambda: write_report(run, table=f"{run}/table")


STAGES = ("sampling", "scoring", "collating", "training", "training, packed", "report")


def measure(stage: str, length: int, a) -> dict[str, float]:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as directory:
        work = prepare(stage, make_model(Path(directory, "model"), a.vocab, max(a.lengths)), length, a)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before, start = memory_mib()["VmRSS"], time.process_time()
        work()
        return {"mib": memory_mib()["VmHWM"] - before, "seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.only:
        print(json.dumps(measure(a.only[0], int(a.only[1]), a)))
        return
    table = Table("", *(f"{length:,} tokens" for length in a.lengths), box=MARKDOWN,
                  title=f"Peak memory of {a.rows} rows, MiB, and CPU seconds")  # fmt: skip
    for stage in a.stages:
        cells = []
        for length in a.lengths:
            command = [sys.executable, *sys.argv, "--only", stage, str(length)]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                raise SystemExit(child.stderr[-3000:])
            found = json.loads(child.stdout.splitlines()[-1])
            cells.append(f"{found['mib']:,.0f} ({found['seconds']:.1f} s)")
            print(stage, length, cells[-1], file=sys.stderr, flush=True)
        table.add_row(stage, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
