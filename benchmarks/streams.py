"""How fast the rows of a stream become checked batches, beside those of a table.

The synthetic rollouts of `benchmarks/table_size.py`, with k = 8, pass through a `DataLoader` in this process to the
trainer's collator: as a saved table in random order, alone and after `validate_table`; as a stream of the same Arrow
files, whose rows are checked as they arrive; through a shuffle buffer; from a parquet shard as `ShardStore` writes it;
and through a `map` in Python, from which rows come as lists. "only read" makes no batches: it is what a row costs that
another process trains on. The passes alternate in random order, and figures are medians of the time of the CPU, of
all threads together. With `--min_ratio`, the script fails where the stream of Arrow files has less than that part of
a table's speed, `validate_table` included.

    python benchmarks/streams.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset, disable_progress_bars, load_dataset, load_from_disk
from rich.console import Console
from rich.table import Table
from table_size import VOCABULARY, Rollouts
from torch.utils.data import DataLoader

from trl_lopd import validate_table
from trl_lopd.table.schema import TableRows
from trl_lopd.table.store import ShardStore
from trl_lopd.training.collator import OfflineOPDCollator
from trl_lopd.training.rows import RowCheck, columns_of, in_arrow

TABLE, CHECKED, STREAM = "table", "table, with `validate_table`", "stream of Arrow files"


def passes(table: Dataset, parquet: str, batch_size: int, buffer: int) -> dict[str, Callable[[], Iterable]]:
    """Returns what a pass over the rows is, by its name."""
    collator = OfflineOPDCollator(pad_token_id=0)
    stream = table.to_iterable_dataset()
    of_parquet = load_dataset("parquet", data_files=parquet, split="train", streaming=True)
    columns = columns_of(next(iter(in_arrow(stream))))

    def of_table(check: bool = False) -> Iterable:
        if check:
            validate_table(table)
        return DataLoader(TableRows(table), batch_size, shuffle=True, collate_fn=collator)

    def of_stream(stream: IterableDataset) -> Iterable:
        read = RowCheck(floor=None, vocab=(VOCABULARY, VOCABULARY), columns=columns)
        return DataLoader(in_arrow(stream), batch_size, collate_fn=replace(collator, read=read))

    return {
        TABLE: of_table,
        CHECKED: lambda: of_table(check=True),
        STREAM: lambda: of_stream(stream),
        f"{STREAM}, shuffled": lambda: of_stream(stream.shuffle(seed=0, buffer_size=buffer)),
        f"{STREAM}, only read": lambda: in_arrow(stream),
        "stream of parquet": lambda: of_stream(of_parquet),
        "stream of parquet, only read": lambda: in_arrow(of_parquet),
        f"{STREAM}, mapped in Python": lambda: of_stream(stream.map(lambda row: row)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--buffer", type=int, default=100, help="rows in the shuffle buffer")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes over the rows, after an untimed one")
    parser.add_argument("--min_ratio", type=float, help="least speed of the stream, as a part of the checked table's")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    a = parser.parse_args()
    disable_progress_bars()

    rollouts = Rollouts(a.rows, np.random.default_rng(0))
    tokens = int(rollouts.sizes.sum())
    with tempfile.TemporaryDirectory() as tmp:
        rollouts.table(8).save_to_disk(Path(tmp) / "arrow")
        table = load_from_disk(Path(tmp) / "arrow")
        with ShardStore(Path(tmp) / "shards", pins={}, rows=a.rows, rows_per_shard=a.rows) as store:
            store.write(0, table.data.table)
        (shard,) = (Path(tmp) / "shards").glob("*.parquet")
        readers = passes(table, str(shard), a.batch_size, a.buffer)
        seconds = {name: [] for name in readers}
        for repeat in range(a.repeats + 1):
            for name in random.Random(repeat).sample(list(readers), len(readers)):
                start = time.process_time()
                for _ in readers[name]():
                    pass
                if repeat:
                    seconds[name].append(time.process_time() - start)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    console = Console(width=119)
    shown = Table("rows", "rows/s of CPU", "tokens/s of CPU", "ratio to the table", "and to the checked table")
    for name, median in medians.items():
        shown.add_row(
            name, f"{a.rows / median:,.0f}", f"{tokens / median:,.0f}",
            *(f"{medians[other] / median:.2f}" for other in (TABLE, CHECKED)),
        )  # fmt: skip
    console.print(f"{a.rows} rows, {tokens:,} completion tokens, k = 8")
    console.print(shown)
    if a.output:
        Path(a.output).write_text(json.dumps({"settings": vars(a) | {"tokens": tokens}, "seconds": medians}, indent=2))
    ratio = medians[CHECKED] / medians[STREAM]
    if a.min_ratio is not None and ratio < a.min_ratio:
        raise SystemExit(f"The stream has {ratio:.2f} of the checked table's speed, less than {a.min_ratio}.")


if __name__ == "__main__":
    main()
