"""What hours of sampling and of scoring have in common: shards on disk, shares of processes, progress, totals."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetInfo, concatenate_datasets
from datasets.utils import are_progress_bars_disabled
from tqdm.auto import tqdm

from ..processes import on_main_process, processes, wait_for_everyone
from ..table.store import ShardStore

logger = logging.getLogger(__name__)


class ShardedRun:
    """
    A computation over the input rows `0..len(sizes) - 1`, in shards, in memory or on disk.

    ```python
    with ShardedRun("Scoring", "token", sizes, 4096, output_dir, pins) as run:
        for shard, span in run.pending():
            run.write(shard, compute(data.select(span), run.advance), completion_tokens=sizes[span].sum())
        table = run.dataset()
    ```

    On disk (`output_dir`), shards that are done are not computed again, and the processes of an `accelerate launch`
    share the others; see [`ShardStore`]. All processes make the same calls. While it runs, a progress bar shows tokens
    a second and the time left, of this process's share, unless `datasets` has its own disabled. At the end, with
    `output_dir`, one line of JSON is logged, which the command line prints: the counts given to `write`, of all
    processes and of earlier runs, and what this run added. If a wandb run is active, it gets the same under
    `scoring/` or `sampling/`.

    Args:
        title (`str`): "Scoring" or "Sampling".
        unit (`str`): What the progress bar counts.
        sizes (`(rows,)` array): How many of those each input row stands for.
        rows_per_shard (`int`): Input rows of a shard.
        output_dir (`str` or `Path`, *optional*): Directory of the store. Without it all is in memory.
        pins (`dict`, *optional*): See [`ShardStore`].
        whole ([`ShardedRun`], *optional*): The run of which this is a part, see [`~several`]. The part moves the
            progress bar of the whole, whose totals are those of its parts.

    Raises:
        ValueError: If there are several processes and no `output_dir`.
        ShardError: On entering, if the store cannot be used.
    """

    def __init__(
        self,
        title: str,
        unit: str,
        sizes: np.ndarray,
        rows_per_shard: int,
        output_dir: str | Path | None,
        pins: dict[str, Any],
        whole: ShardedRun | None = None,
    ):
        self.state, self.whole = processes(), whole
        if self.state.num_processes > 1 and output_dir is None:
            raise ValueError("Several processes write into one directory: give `output_dir`.")
        self.title, self.unit, self.sizes, self.rows_per_shard = title, unit, sizes, rows_per_shard
        self.output_dir, self.store, self.parts, self.tokens = output_dir, None, [], 0
        self._counts: Counter[str] = Counter()
        if output_dir is not None:
            self.store = ShardStore(
                output_dir,
                pins=pins,
                rows=len(sizes),
                rows_per_shard=rows_per_shard,
                process_index=self.state.process_index,
                num_processes=self.state.num_processes,
            )

    def __enter__(self) -> ShardedRun:
        with ExitStack() as stack:
            if self.store is not None:
                # The main process first: it checks the directory, and makes it a store.
                on_main_process(self.state, lambda: stack.enter_context(self.store) and None)
                self.before = Counter(self.store.counts() if self.state.is_main_process else {})
                wait_for_everyone(self.state)
                if not self.state.is_main_process:
                    stack.enter_context(self.store)
            share = range(
                self.state.process_index, -(-len(self.sizes) // self.rows_per_shard), self.state.num_processes
            )
            self._pending = list(share) if self.store is None else self.store.pending
            total = sum(self.sizes[self._span(shard)].sum() for shard in share)
            done = int(total - sum(self.sizes[self._span(shard)].sum() for shard in self._pending))
            if self.whole is not None:
                self.bar = self.whole.bar
                self.bar.update(done)
            else:
                self.bar = stack.enter_context(
                    tqdm(
                        total=int(total),
                        initial=done,
                        desc=self.title,
                        unit=self.unit,
                        unit_scale=self.unit == "token",
                        disable=not self.state.is_local_main_process or are_progress_bars_disabled(),
                    )
                )
            self.start = time.perf_counter()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)

    def _span(self, shard: int) -> slice:
        return slice(shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard)

    def pending(self) -> Iterator[tuple[int, range]]:
        """Shards to compute, and the input rows of each."""
        for shard in self._pending:
            yield shard, range(*self._span(shard).indices(len(self.sizes)))

    def advance(self, tokens: int, units: int | None = None) -> None:
        """Moves the progress bar by as many units, by default tokens."""
        self.tokens += tokens
        if self.whole is not None:
            self.whole.tokens += tokens
        self.bar.update(tokens if units is None else units)
        if units is not None:
            self.bar.set_postfix_str(f"{self._rate():,.0f} token/s", refresh=False)

    def _rate(self) -> float:
        return self.tokens / (time.perf_counter() - self.start)

    @property
    def is_complete(self) -> bool:
        """Whether all shards are on disk, of all processes; to be asked when all have entered."""
        return self.store is not None and self.store.is_complete

    def write(self, shard: int, part: Dataset, **counts: int) -> None:
        """Keeps what came out of a shard: any number of rows, all shards with the same columns."""
        if self.store is None:
            self.parts.append(part)
            self._counts.update(counts)
        else:
            self.store.write(shard, part.data.table, **counts)
        self._report({"tokens_per_second": self._rate(), "completion_tokens": self.tokens})

    def _report(self, values: dict[str, Any]) -> None:
        # Nothing is imported for it: who wants it has started a run.
        wandb = sys.modules.get("wandb")
        if self.state.is_main_process and wandb is not None and wandb.run is not None:
            wandb.run.log({f"{self.title.lower()}/{name}": value for name, value in values.items()})

    def counts(self) -> dict[str, int]:
        """Sums of the counts given to `write`, of all processes and runs; to be asked after `dataset`."""
        return self.store.counts() if self.store is not None else dict(self._counts)

    def dataset(self) -> Dataset:
        """All rows, in the order of the input, when all processes are done."""
        wait_for_everyone(self.state)
        if self.store is None:
            return concatenate_datasets(self.parts)
        if self.whole is not None:
            self.whole.before.update(self.before)
            return self.store.dataset()
        self.bar.close()
        seconds = time.perf_counter() - self.start
        table = self.store.dataset()
        if self.state.is_main_process:
            counts = self.counts()
            done, before = (c.get("sampled_tokens", c.get("completion_tokens", 0)) for c in (counts, self.before))
            tokens = done - before
            totals = {
                "run": self.title.lower(),
                "output_dir": str(self.output_dir),
                "rows": len(table),
                **counts,
                "seconds": round(seconds, 3),
                "tokens_this_run": tokens,
                "tokens_per_second": round(tokens / seconds, 1),
                "processes": self.state.num_processes,
            }
            logger.info(json.dumps(totals))
            self._report({name: value for name, value in totals.items() if not isinstance(value, str)})
        return table


def take(dataset: Dataset, rows: Sequence[int]) -> Dataset:
    """Copies some rows. Unlike `select`, it leaves no indices mapping, whose removal would show a progress bar."""
    return Dataset(dataset.with_format("arrow")[list(rows)], info=DatasetInfo(features=dataset.features))
