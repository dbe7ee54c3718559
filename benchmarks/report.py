"""How large a report of many long rollouts is, and how fast it is in Chromium.

Random tokens of a vocabulary of 151,936, scored by nobody: nothing in them compresses as text would, so a report of
real rollouts of as many tokens is smaller.

    python benchmarks/report.py --rows 1000 --tokens 1000 --top_k 8
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_lopd import stamp_model_card, table_features
from trl_lopd.evaluation.report.report import write_report

VOCABULARY = 151_936
TEACHER = "teacher@1-0123456789ab-01234567-01234567"


def make_run(directory: Path, rows: int, tokens: int, top_k: int) -> None:
    """A run without weights, and a table with the scores of the policy that sampled it."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(directory)
    stamp_model_card(directory, sft_teachers=TEACHER)
    rng = np.random.default_rng(0)

    def lists(values: np.ndarray) -> list[np.ndarray]:
        return list(values.reshape(rows, tokens, *values.shape[1:]))

    # All different at each position.
    topk = np.cumsum(rng.integers(1, VOCABULARY // top_k, (rows * tokens, top_k)), 1) % VOCABULARY
    scores = np.log(rng.dirichlet(np.full(top_k, 0.3), rows * tokens).clip(1e-6) * 0.99)
    scores = scores.astype(np.float16).astype(np.float32)
    chosen = rng.integers(0, top_k, rows * tokens)
    columns = {
        "prompt_ids": list(rng.integers(0, VOCABULARY, (rows, 50))),
        "completion_ids": lists(topk[np.arange(rows * tokens), chosen]),
        "teacher_logprobs": lists(scores[np.arange(rows * tokens), chosen]),
        "teacher_fingerprint": [TEACHER] * rows,
        "ref_logprobs": lists(-rng.exponential(0.3, rows * tokens)),
    }
    features = table_features(top_k=top_k, ref_logprobs=True)
    table = {name: pa.array(values) for name, values in columns.items()}
    for name, values in (("teacher_topk_ids", topk), ("teacher_topk_logprobs", scores)):
        dtype = np.int32 if name == "teacher_topk_ids" else np.float16
        inner = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(dtype).ravel()), top_k)
        table[name] = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * tokens), inner)
    schema = Features({name: features[name] for name in table}).arrow_schema
    Dataset(pa.table(table).cast(schema)).to_parquet(directory / "table.parquet")


def measure(path: Path) -> dict[str, float]:
    """Milliseconds in a fresh Chromium: to the first paint, to the first tokens, and of what a reader then does."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector("article .tokens span", timeout=120_000)
        times = page.evaluate(
            """async () => {
                const timed = async (act) => {
                    const start = performance.now();
                    act();
                    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
                    return performance.now() - start;
                };
                const form = document.getElementById("controls");
                const set = (name, value) => () => {
                    form.elements[name].value = value;
                    form.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
                };
                const result = { "first paint": performance.getEntriesByName("first-contentful-paint")[0].startTime };
                result["tokens shown"] = performance.getEntriesByName("rollouts")[0].startTime;
                result["next page"] = await timed(() => document.querySelector("#pager [value='1']").click());
                result["colours anew"] = await timed(() => form.elements.numbers.click());
                result["sort"] = await timed(set("sort", "row"));
                result["first search"] = await timed(set("find", "t17 t1"));
                result["next search"] = await timed(set("find", "t17 t1 t"));
                return result;
            }"""
        )
        browser.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        make_run(directory, args.rows, args.tokens, args.top_k)
        start = time.perf_counter()
        written = write_report(directory, table=str(directory / "table.parquet"), rows=args.rows)
        seconds = time.perf_counter() - start
        runs = [measure(directory / "report.html") for _ in range(args.repeats)]
    table = Table("", "median", title=f"{written['rollouts']:,} rollouts of {args.tokens:,} tokens, top-{args.top_k}")
    table.add_row("file", f"{written['bytes'] / 1e6:.1f} MB")
    table.add_row("written in", f"{seconds:.0f} s")
    for name in runs[0]:
        table.add_row(name, f"{statistics.median(run[name] for run in runs):,.0f} ms")
    Console().print(table)


if __name__ == "__main__":
    main()
