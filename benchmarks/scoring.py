"""Local scoring: `LocalTeacher.score` beside a padded loop over full logits, and beside the bare forward.

Variants alternate in one process, in random order; the ratio of medians is the result. Rows have distinct prompts and
long-tailed lengths; the last two variants score several completions of each prompt. Peak memory is measured in a
process of its own for each of two variants and two vocabularies, on a model of two layers.

The model is random. By default its head does 7 % of the work, as in a model of 8 B parameters and a vocabulary of
128 k: with a small body and a large vocabulary, no scoring comes near the bare forward.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --device cuda --dtype bfloat16 --attention flash_attention_2 --hidden 4096 \
        --layers 36 --vocab 128256 --rows 1024 --max_batch_tokens 65536 --memory_vocab 32768 262144
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_lopd.generation import teachers
from trl_lopd.generation.teachers import LocalTeacher

OURS, LOOP, FORWARD = "LocalTeacher.score", "padded loop, full log_softmax", "bare forward, our batches"
SHARED, UNSHARED = "n completions, prompts shared", "n completions, not shared"


def make_model(a, vocab: int, layers: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=a.hidden,
        intermediate_size=3 * a.hidden,
        num_hidden_layers=layers,
        num_attention_heads=a.hidden // a.head_dim,
        num_key_value_heads=max(1, a.hidden // a.head_dim // 4),
        head_dim=a.head_dim,
        attn_implementation=a.attention,
        dtype=a.dtype,
    )
    with torch.device(a.device):
        return Qwen3ForCausalLM._from_config(config, attn_implementation=a.attention, dtype=a.dtype).eval()


def make_rows(a, rows: int, vocab: int, completions: int, longest: int) -> tuple[list[np.ndarray], list[int]]:
    """Lengths are lognormal: half of the prompts and completions are shorter than `--prompt` and `--completion`."""
    rng = np.random.default_rng(0)
    sequences, counts = [], []
    while len(sequences) < rows:
        prompt = rng.integers(0, vocab, int(np.clip(rng.lognormal(np.log(a.prompt), 0.5), 4, longest // 2)))
        for _ in range(completions):
            count = int(np.clip(rng.lognormal(np.log(a.completion), a.sigma), 4, longest - len(prompt)))
            sequences.append(np.concatenate([prompt, rng.integers(0, vocab, count)]))
            counts.append(count)
    return sequences, counts


@torch.inference_mode()
def padded_loop(model, sequences, counts, top_k: int, rows_per_batch: int) -> list:
    """Scoring as one writes it by hand."""
    results = []
    for start in range(0, len(sequences), rows_per_batch):
        batch = [torch.from_numpy(sequence) for sequence in sequences[start : start + rows_per_batch]]
        input_ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        logits = model(input_ids=input_ids, attention_mask=attention_mask.to(model.device), use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(-1)
        sampled = logprobs.gather(-1, input_ids[:, 1:, None])[..., 0].cpu()
        top = logprobs.topk(top_k)
        top_ids, top_logprobs = top.indices.cpu(), top.values.cpu()
        for i, row in enumerate(batch):
            scored = slice(len(row) - 1 - counts[start + i], len(row) - 1)
            results.append((sampled[i, scored], top_ids[i, scored], top_logprobs[i, scored]))
    return results


def bare_forward(model, inputs: list[dict]):
    """The same tokens in the same batches, which are on the device already; no head, and nothing comes back."""
    with torch.inference_mode():
        for batch in inputs:
            model.base_model(**batch, use_cache=False)


def synchronize(a):
    if a.device == "cuda":
        torch.cuda.synchronize()


def memory(a) -> tuple[float, float]:
    """MiB in use, and the most there were: of the allocator on a GPU, of the whole process on a CPU (Linux)."""
    if a.device == "cuda":
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return tuple(int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def forget_peak(a):
    if a.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def measure_memory(a):
    """MiB beyond those of the loaded model."""
    variant, vocab = a.only
    model = make_model(a, int(vocab), layers=2)
    if variant == OURS:
        score = LocalTeacher(model, a.max_batch_tokens).score
    else:

        def score(sequences, counts, top_k):
            return padded_loop(model, sequences, counts, top_k, a.rows_per_batch)

    score([np.arange(8)], [4], a.top_k)  # what libraries allocate once
    forget_peak(a)
    before, _ = memory(a)
    score(*make_rows(a, a.memory_rows, int(vocab), 1, a.memory_longest), a.top_k)
    print(json.dumps(memory(a)[1] - before))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--attention", default="sdpa", help="attention implementation")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=48, help="median tokens of a prompt")
    parser.add_argument("--completion", type=int, default=128, help="median tokens of a completion")
    parser.add_argument("--sigma", type=float, default=0.8, help="of the logarithm of the completions' lengths")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a row at most")
    parser.add_argument("--completions", type=int, default=8, help="of each prompt, in the last two variants")
    parser.add_argument("--shared_prompt", type=int, default=200, help="median tokens of a prompt in those")
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--max_batch_tokens", type=int, default=2048, help="of ours")
    parser.add_argument("--rows_per_batch", type=int, default=8, help="of the padded loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory_vocab", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--memory_rows", type=int, default=16)
    parser.add_argument("--memory_longest", type=int, default=256)
    parser.add_argument("--output", help="also write the figures to this JSON file")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.only:
        measure_memory(a)
        return

    model = make_model(a, a.vocab, a.layers)
    sequences, counts = make_rows(a, a.rows, a.vocab, 1, a.longest)
    of_groups = argparse.Namespace(**vars(a) | {"prompt": a.shared_prompt})
    grouped = make_rows(of_groups, a.rows, a.vocab, a.completions, a.longest)
    lengths = np.array([len(sequence) for sequence in sequences])
    packed = teachers._packs(model)
    batches = [
        teachers._inputs(model, [sequences[row] for row in rows])[0]
        for rows in teachers.batches_of_like_length(lengths, a.max_batch_tokens, packed)
    ]
    teacher = LocalTeacher(model, a.max_batch_tokens)
    pays = teachers._SHARING_PAYS

    def score_grouped(threshold: float):
        teachers._SHARING_PAYS = threshold
        teacher.score(*grouped, a.top_k)
        teachers._SHARING_PAYS = pays

    variants = {
        OURS: lambda: teacher.score(sequences, counts, a.top_k),
        LOOP: lambda: padded_loop(model, sequences, counts, a.top_k, a.rows_per_batch),
        FORWARD: lambda: bare_forward(model, batches),
        SHARED: lambda: score_grouped(pays),
        UNSHARED: lambda: score_grouped(float("inf")),
    }
    tokens = dict.fromkeys((OURS, LOOP, FORWARD), sum(lengths)) | dict.fromkeys(
        (SHARED, UNSHARED), sum(map(len, grouped[0]))
    )
    for ours, theirs in zip(variants[OURS](), variants[LOOP](), strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs[0].numpy(), atol=1e-4 if a.dtype == torch.float32 else 0.5)
    times = {name: [] for name in variants}
    rng = random.Random(0)
    for repeat in range(a.repeats + 1):
        for name in rng.sample(list(variants), len(variants)):
            synchronize(a)
            start = time.perf_counter()
            variants[name]()
            synchronize(a)
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)

    body, head = (sum(p.numel() for p in part.parameters()) for part in (model.model.layers, model.lm_head))
    results = {
        name: {"median_s": statistics.median(t), "tokens_per_s": float(tokens[name] / statistics.median(t)), "s": t}
        for name, t in times.items()
    }
    title = (
        f"{a.device}, {str(a.dtype).removeprefix('torch.')}, {a.attention}: hidden {a.hidden}, {a.layers} layers, "
        f"vocabulary {a.vocab} (head: {head / (body + head):.1%} of the weights multiplied), {a.rows} rows"
    )
    table = Table("variant", "median (s)", "tokens/s", "speed of ours, times this one", title=title)
    for name, r in results.items():
        ours = results[OURS if name in (OURS, LOOP, FORWARD) else SHARED]
        r["ours_is"] = r["median_s"] / ours["median_s"]
        table.add_row(name, f"{r['median_s']:.3f}", f"{r['tokens_per_s']:,.0f}", f"{r['ours_is']:.2f}")
    Console(width=110).print(table)

    peaks = {}
    table = Table(
        "variant", *(f"vocabulary {v:,}" for v in a.memory_vocab), title="peak memory beyond the model (MiB)"
    )
    for name in (OURS, LOOP) if a.memory_vocab else ():
        peaks[name] = {}
        for vocab in a.memory_vocab:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(vocab)]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name][vocab] = json.loads(child.stdout.splitlines()[-1])
        table.add_row(name, *(f"{mib:,.0f}" for mib in peaks[name].values()))
    if peaks:
        Console(width=110).print(table)
    if a.output:
        with open(a.output, "w") as file:
            settings = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(a).items()}
            json.dump({"settings": settings, "time": results, "memory_mib": peaks}, file, indent=2)


if __name__ == "__main__":
    main()
