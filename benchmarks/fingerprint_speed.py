"""How fast `fingerprint_teacher` hashes a checkpoint, beside reading the same files and beside `sha256sum` of them.

The variants alternate in random order, so that whatever else the machine does falls on all of them; medians are
compared. Twice: with the files in the page cache, and without. In a virtual machine a file that has left the page
cache may still be in the host's. Peak memory is measured in a process of its own. Prints tables and, with `--output`,
writes JSON. Needs Linux.

    python benchmarks/fingerprint_speed.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_lopd import fingerprint_teacher

# The second read is what the disk can give.
VARIANTS = ("read", "read, in threads", "sha256sum", "fingerprint")


def make_checkpoint(directory: Path, hidden: int, gigabytes: float, shards: int) -> list[Path]:
    """A Llama of random bfloat16, written a shard at a time; its files."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=3 * hidden, dtype="bfloat16", vocab_size=16 * hidden)
    config.num_attention_heads = config.num_key_value_heads = hidden // 64
    config.architectures = ["LlamaForCausalLM"]
    layer_bytes, other_bytes = 2 * 13 * hidden**2, 2 * 2 * config.vocab_size * hidden
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 - other_bytes) / layer_bytes))
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).bfloat16().state_dict()

    groups, done, total = [{} for _ in range(shards)], 0, sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        groups[done * shards // total][name] = tensor.shape
        done += tensor.nbytes
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        # Bits, not normal numbers: faster to make, and no easier to hash.
        shard = {name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16) for name, shape in group.items()}
        shard = {name: tensor.view(torch.bfloat16) for name, tensor in shard.items()}
        save_file(shard, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)
    vocabulary = models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), unk_token="a").save_pretrained(directory)
    os.sync()
    return sorted(directory.glob("*.safetensors"))


def leave_page_cache(files: list[Path]):
    for file in files:
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(file: Path):
    buffer = bytearray(2**20)
    with open(file, "rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass


def run(variant: str, directory: Path, files: list[Path]) -> float:
    """Seconds."""
    start = time.perf_counter()
    if variant.startswith("read"):
        with ThreadPoolExecutor(1 if variant == "read" else 4) as threads:
            list(threads.map(read, files))
    elif variant == "sha256sum":
        subprocess.run(["sha256sum", *files], stdout=subprocess.DEVNULL, check=True)
    else:
        fingerprint_teacher(directory)
    return time.perf_counter() - start


def memory_mib() -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(status[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM", "RssAnon")}


def measure_memory(directory: Path, warm_up: Path) -> dict[str, float]:
    """MiB of this process before the fingerprint, and the most during it."""
    fingerprint_teacher(warm_up)  # what the libraries take, for a checkpoint of a few MB
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, peak, done = memory_mib(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], memory_mib()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    fingerprint_teacher(directory)
    done.set()
    watcher.join()
    return {
        "resident_before": before["VmRSS"],
        "resident_peak": memory_mib()["VmHWM"],
        "anonymous_before": before["RssAnon"],
        "anonymous_peak": peak[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--directory", help="where to put the checkpoint for the time; default: the temporary directory"
    )
    parser.add_argument("--output", help="also write the figures to this JSON file")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.memory:
        print(json.dumps(measure_memory(*map(Path, a.memory))))
        return

    with tempfile.TemporaryDirectory(dir=a.directory) as tmp:
        directory, small = Path(tmp, "checkpoint"), Path(tmp, "small")
        directory.mkdir()
        small.mkdir()
        files = make_checkpoint(directory, a.hidden, a.gigabytes, a.shards)
        make_checkpoint(small, 64, 0, 1)
        gigabytes = sum(file.stat().st_size for file in files) / 1e9

        child = [sys.executable, __file__, "--memory", str(directory), str(small)]
        child = subprocess.run(child, capture_output=True, text=True, check=True)
        memory = json.loads(child.stdout.splitlines()[-1])

        for variant in reversed(VARIANTS):  # untimed; leaves the files in the page cache
            run(variant, directory, files)
        times = {(state, variant): [] for state in ("cold", "warm") for variant in VARIANTS}
        rng = random.Random(0)
        for _ in range(a.repeats):
            for state, variant in rng.sample(list(times), len(times)):
                # What ran before must not decide.
                leave_page_cache(files) if state == "cold" else run("read", directory, files)
                times[state, variant].append(run(variant, directory, files))

    results = {}
    title = f"{gigabytes:.2f} GB in {len(files)} safetensors files, {os.cpu_count()} CPUs, median of {a.repeats}"
    table = Table("page cache", "", "time (s)", "least - most", "GB/s", "x reading", "x sha256sum", title=title)
    for (state, variant), seconds in times.items():
        median = statistics.median(seconds)
        r = results[f"{state}: {variant}"] = {
            "seconds": seconds,
            "median_s": median,
            "gb_per_s": gigabytes / median,
            "ratio_to_read": statistics.median(times[state, "read"]) / median,
            "ratio_to_sha256sum": statistics.median(times[state, "sha256sum"]) / median,
        }
        table.add_row(
            state,
            variant,
            f"{median:.3f}",
            f"{min(seconds):.2f} - {max(seconds):.2f}",
            f"{r['gb_per_s']:.2f}",
            f"{r['ratio_to_read']:.2f}",
            f"{r['ratio_to_sha256sum']:.2f}",
            end_section=variant == VARIANTS[-1],
        )
    console = Console(width=110)
    console.print(table)
    table = Table("memory of the fingerprint (MiB)", "before", "peak", "more", title="in a process of its own")
    for kind, name in (("resident", "resident (VmHWM)"), ("anonymous", "anonymous (RssAnon)")):
        before, peak = memory[f"{kind}_before"], memory[f"{kind}_peak"]
        table.add_row(name, f"{before:.0f}", f"{peak:.0f}", f"{peak - before:.0f}")
    console.print(table)
    if a.output:
        Path(a.output).write_text(
            json.dumps(
                {"settings": vars(a), "gigabytes": gigabytes, "results": results, "memory_mib": memory}, indent=2
            )
        )


if __name__ == "__main__":
    main()
