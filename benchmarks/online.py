"""An optimizer step of TRL's online `DistillationTrainer` beside one of `OfflineOPDTrainer`, every cost counted.

Student, prompts, batch and completion lengths are the same, and the teacher has about four times the student's
parameters. Online, each step samples completions, runs the teacher over them and trains. Offline, completions are
sampled and scored once for the whole table, and each step only trains; what sampling and scoring cost is added to the
steps, divided by the epochs that the table serves. Seconds are CPU seconds of the one thread, or those of the clock on
a GPU.

    python benchmarks/online.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_lopd import OfflineOPDConfig, OfflineOPDTrainer, collect_rollouts, score_rollouts


def make_model(a, hidden: int, layers: int, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=a.vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        tie_word_embeddings=True,
        # Hardly ever sampled, so that all completions are of about one length.
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).to(a.device, a.dtype)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1")


class Clock(TrainerCallback):
    """Seconds of each step, from the end of the one before."""

    def __init__(self, now):
        self.now, self.seconds = now, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.now()
        self.seconds.append(now - self.last)
        self.last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="timed, after one that is not")
    parser.add_argument("--sampling_batch_size", type=int, default=64, help="of the rollouts, offline")
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--json", help="also write the figures to this file")
    a = parser.parse_args()
    a.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)

    def now() -> float:
        if a.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    tokenizer = make_tokenizer(a.vocab)
    # 2.2 times as wide: about four times the parameters, with these layers and this vocabulary.
    teacher = make_model(a, hidden=a.hidden * 9 // 4 // 64 * 64, layers=a.layers + a.layers // 2, seed=1).eval()
    rng = random.Random(0)
    rows = a.batch_size * (a.steps + 1)
    prompts = [" ".join(str(rng.randrange(2, a.vocab)) for _ in range(a.prompt)) for _ in range(rows)]
    common = dict(
        per_device_train_batch_size=a.batch_size,
        max_steps=a.steps + 1,
        learning_rate=1e-5,
        max_completion_length=a.completion,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=a.device == "cpu",
    )

    with tempfile.TemporaryDirectory() as directory:
        student = make_model(a, a.hidden, a.layers, seed=0)
        sizes = student.num_parameters(), teacher.num_parameters()
        online, offline = Clock(now), Clock(now)
        args = DistillationConfig(f"{directory}/online", **common, gradient_checkpointing=False)
        trainer = DistillationTrainer(
            student,
            teacher,
            args,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[online],
        )
        trainer.train()

        student = make_model(a, a.hidden, a.layers, seed=0)
        start = now()
        rollouts = collect_rollouts(
            prompts,
            student,
            processing_class=tokenizer,
            max_completion_length=a.completion,
            temperature=1.0,
            batch_size=a.sampling_batch_size,
            truncated="keep",
        )
        sampled = now()
        table = score_rollouts(rollouts, teacher, processing_class=tokenizer, top_k=8)
        scored = now()
        length = statistics.fmean(map(len, table["completion_ids"]))
        args = OfflineOPDConfig(
            f"{directory}/offline", **common, activation_checkpointing=False, teacher_consistency="off"
        )
        OfflineOPDTrainer(student, args, table, processing_class=tokenizer, callbacks=[offline]).train()

    online_step, train = statistics.median(online.seconds[1:]), statistics.median(offline.seconds[1:])
    sampling, scoring = ((end - begin) * a.batch_size / rows for begin, end in ((start, sampled), (sampled, scored)))
    title = f"{a.device}, student of {sizes[0]:,} and teacher of {sizes[1]:,} parameters"
    show = Table("", "seconds a step", "online, times this", title=title)
    results = {"online (TRL)": online_step, "offline, training alone": train}
    results |= {f"offline, all, {n} epoch{'s' * (n > 1)}": train + (sampling + scoring) / n for n in (1, 2, 4)}
    for name, seconds in results.items():
        show.add_row(name, f"{seconds:.3f}", f"{online_step / seconds:.2f}")
    show.caption = (
        f"of a batch offline, once: sampling {sampling:.3f} s, scoring {scoring:.3f} s; {length:.0f} tokens each"
    )
    Console(width=100).print(show)
    if a.json:
        with open(a.json, "w") as file:
            json.dump(results | {"sampling": sampling, "scoring": scoring, "parameters": sizes}, file, indent=2)


if __name__ == "__main__":
    main()
