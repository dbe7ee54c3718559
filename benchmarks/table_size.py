"""What a completion token takes in a table, and how fast rows get from disk into a batch.

Tables of the same synthetic rollouts with k = 0, 4 and 8 stored top-k tokens stand beside the format of the Lightning
OPD reference code: a nested `metadata` column with `response_ids` and `teacher_log_probs` as lists of Python numbers,
64 bits each. Completions are long-tailed, log-probabilities mostly near 0, token ids follow Zipf's law; which id has
which rank is random, because parquet would profit from an order.

Sizes are bytes a completion token: of the Arrow file that `save_to_disk` writes, of the Arrow buffers, of the buffers
without the prompts and what that is over the bound of 8 + 6k, and of parquet as `ShardStore` and as
`Dataset.to_parquet` write it. Speeds are those of shuffled rows of the saved table, read in batches and collated; the
formats alternate in random order, and the figure is the median. The reference format has its prompts as text, which
would have to be tokenized; its prompt ids are handed to the collator without a charge.

    python benchmarks/table_size.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, disable_progress_bars, load_from_disk
from rich.console import Console
from rich.table import Table

from trl_lopd import table_features, validate_table
from trl_lopd.generation.scoring import with_scores
from trl_lopd.generation.teachers import Scores
from trl_lopd.table.schema import TableRows
from trl_lopd.table.store import ShardStore
from trl_lopd.training.collator import OfflineOPDCollator

VOCABULARY = 151_936
KS = (0, 4, 8)
# Tokens to which the synthetic teacher gives any probability.
CANDIDATES = 16
REFERENCE = "reference format"
REFERENCE_FEATURES = Features(
    {
        "prompt": Value("string"),
        "metadata": {"teacher_log_probs": List(Value("float64")), "response_ids": List(Value("int64"))},
    }
)


class Rollouts:
    """Synthetic prompts, completions and what the teacher says about them.

    Attributes:
        prompts (list of `(prompt,)` int32): Token ids.
        sizes (`(rows,)` int): Completion tokens of each row.
        ids, logprobs (`(tokens, CANDIDATES)` int32 and float32): The teacher's distribution, most likely first.
        sampled (`(tokens,)` int): Which candidate was sampled.
    """

    def __init__(self, rows: int, rng: np.random.Generator):
        self._ids_by_rank = rng.permutation(VOCABULARY).astype(np.int32)
        self._cumulative = np.cumsum(1 / (np.arange(VOCABULARY) + 2.7))
        self._cumulative /= self._cumulative[-1]
        self.prompts = [self._draw(size, rng) for size in rng.poisson(150, rows) + 1]
        self.sizes = np.clip(rng.lognormal(np.log(900), 0.8, rows), 32, 4096).astype(int)
        tokens = int(self.sizes.sum())
        self.ids = self._draw((tokens, CANDIDATES), rng)
        while (repeated := _repeated(self.ids)).any():
            self.ids[repeated] = self._draw(int(repeated.sum()), rng)
        # Large steps between the candidates where the teacher is sure, small ones where it is not.
        steps = rng.exponential(1, (tokens, CANDIDATES)) * rng.lognormal(1, 1, (tokens, 1))
        logits = -np.cumsum(steps, axis=-1)
        logits -= logits[:, :1]
        self.logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
        self.sampled = (self.logprobs + rng.gumbel(size=logits.shape)).argmax(-1)

    def _draw(self, shape: int | tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        return self._ids_by_rank[np.searchsorted(self._cumulative, rng.random(shape))]

    def completions(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Sampled ids and their log-probabilities, a row each."""
        at, ends = np.arange(len(self.ids)), np.cumsum(self.sizes)[:-1]
        return np.split(self.ids[at, self.sampled], ends), np.split(self.logprobs[at, self.sampled], ends)

    def table(self, top_k: int) -> Dataset:
        """As `collect_rollouts` and `score_rollouts` make it."""
        ids, logprobs = self.completions()
        features = Features({name: table_features()[name] for name in ("prompt_ids", "completion_ids")})
        columns = {"prompt_ids": self.prompts, "completion_ids": ids}
        rollouts = Dataset.from_dict(columns, features=features)
        rollouts = rollouts.add_column("student_fingerprint", ["student@1-000000000000-00000000-00000000"] * len(ids))
        ends = np.cumsum(self.sizes)[:-1]
        top_ids = np.split(self.ids[:, :top_k], ends)
        top_logprobs = np.split(self.logprobs[:, :top_k].astype(np.float16), ends)
        scores = [Scores(*row) for row in zip(logprobs, top_ids, top_logprobs, strict=True)]
        table = with_scores(rollouts, "teacher@1-000000000000-00000000-00000000", top_k, scores, None)
        validate_table(table)
        return table

    def reference(self) -> Dataset:
        """As the reference code writes it; a prompt token is four letters of text."""
        ids, logprobs = self.completions()
        rows = [
            {
                "prompt": " ".join(np.base_repr(id, 36).rjust(3, "0")[-3:] for id in prompt),
                "metadata": {"teacher_log_probs": of_row.astype(np.float64).tolist(), "response_ids": tokens.tolist()},
            }
            for prompt, tokens, of_row in zip(self.prompts, ids, logprobs, strict=True)
        ]
        return Dataset.from_list(rows, features=REFERENCE_FEATURES)


def _repeated(ids: np.ndarray) -> np.ndarray:
    """True where a row has the id further to the left, of the shape of `ids`."""
    order = np.argsort(ids, axis=-1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=-1)
    repeated = np.zeros(ids.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=-1)
    return repeated


def sizes(table: Dataset, bound: int, tokens: int, directory: Path) -> dict[str, float]:
    """Bytes a completion token; leaves what `save_to_disk` writes in `directory / "arrow"`."""
    table.save_to_disk(directory / "arrow")
    arrow = sum(path.stat().st_size for path in (directory / "arrow").glob("*.arrow"))
    with ShardStore(directory / "shards", pins={}, rows=len(table), rows_per_shard=len(table)) as store:
        store.write(0, table.data.table)
    (shard,) = (directory / "shards").glob("*.parquet")
    table.to_parquet(directory / "table.parquet")
    completions = table.remove_columns([name for name in ("prompt_ids", "prompt") if name in table.column_names])
    return {
        "bound": bound,
        "arrow_file": arrow / tokens,
        "arrow_buffers": table.data.nbytes / tokens,
        "arrow_without_prompts": completions.data.nbytes / tokens,
        "over_bound": completions.data.nbytes / tokens / bound - 1,
        "parquet_shards": shard.stat().st_size / tokens,
        "parquet_datasets": (directory / "table.parquet").stat().st_size / tokens,
    }


def reference_reader(table: Dataset, prompts: list[list[int]]) -> Callable[[list[int]], list[dict[str, Any]]]:
    def read(rows: list[int]) -> list[dict[str, Any]]:
        return [
            {
                "prompt_ids": prompts[index],
                "completion_ids": row["metadata"]["response_ids"],
                "teacher_logprobs": row["metadata"]["teacher_log_probs"],
            }
            for index, row in zip(rows, table.__getitems__(rows), strict=True)
        ]

    return read


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes over the rows, after an untimed one")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    a = parser.parse_args()
    disable_progress_bars()

    rollouts = Rollouts(a.rows, np.random.default_rng(0))
    tokens = int(rollouts.sizes.sum())
    prompts = [prompt.tolist() for prompt in rollouts.prompts]
    size, readers = {}, {}
    with tempfile.TemporaryDirectory() as tmp:
        for top_k in KS:
            name = f"k = {top_k}"
            size[name] = sizes(rollouts.table(top_k), 8 + 6 * top_k, tokens, Path(tmp) / name)
            readers[name] = TableRows(load_from_disk(Path(tmp) / name / "arrow")).__getitems__
        size[REFERENCE] = sizes(rollouts.reference(), 8, tokens, Path(tmp) / REFERENCE)
        readers[REFERENCE] = reference_reader(load_from_disk(Path(tmp) / REFERENCE / "arrow"), prompts)
        # What is the format and what is the way it is read: the largest table as `dataset[rows]` gives it.
        readers[f"k = {KS[-1]}, as lists"] = load_from_disk(Path(tmp) / f"k = {KS[-1]}" / "arrow").__getitems__

        collate = OfflineOPDCollator(pad_token_id=0)
        seconds = {name: [] for name in readers}
        rng = random.Random(0)
        for repeat in range(a.repeats + 1):
            order = rng.sample(range(a.rows), a.rows)
            for name in rng.sample(list(readers), len(readers)):
                start = time.perf_counter()
                for first in range(0, a.rows, a.batch_size):
                    rows = readers[name](order[first : first + a.batch_size])
                    collate([{key: row[key] for key in row if "fingerprint" not in key} for row in rows])
                if repeat:
                    seconds[name].append(time.perf_counter() - start)

    results = {}
    for name in readers:
        median = statistics.median(seconds[name])
        results[name] = {
            **size.get(name, {}),
            "rows_per_s": a.rows / median,
            "tokens_per_s": tokens / median,
            "speed_ratio": statistics.median(seconds[REFERENCE]) / median,
        }

    console = Console(width=119)
    title = f"Bytes a completion token; {a.rows} rows, {tokens:,} completion tokens"
    table = Table(
        "table", "bound", "Arrow file", "buffers", "no prompts", "over bound", "shards", "to_parquet", title=title
    )
    for name in size:
        r = results[name]
        table.add_row(
            name, str(r["bound"]), *(f"{r[key]:.2f}" for key in ("arrow_file", "arrow_buffers")),
            f"{r['arrow_without_prompts']:.2f}", f"{100 * r['over_bound']:.1f} %",
            *(f"{r[key]:.2f}" for key in ("parquet_shards", "parquet_datasets")),
        )  # fmt: skip
    console.print(table)
    table = Table("table", "rows/s", "tokens/s", "ratio to the reference", title="Into the collator")
    for name, r in results.items():
        table.add_row(name, f"{r['rows_per_s']:,.0f}", f"{r['tokens_per_s']:,.0f}", f"{r['speed_ratio']:.2f}")
    console.print(table)
    if a.output:
        with open(a.output, "w") as file:
            json.dump({"settings": vars(a) | {"tokens": tokens}, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
