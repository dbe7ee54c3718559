"""What scoring or sampling will cost: a dry run, which counts rows, measures a short sample and writes nothing."""

from __future__ import annotations

import io
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, concatenate_datasets

from ..processes import processes
from ..table.schema import lengths, prompt_and_row_hashes
from ..table.store import write_parquet
from .options import RolloutOptions, ScoringOptions
from .rollouts import AnswerColumns, answerers_of
from .runs import take
from .scoring import Scorer, scorers_of
from .several import naming

if TYPE_CHECKING:
    from .samplers import Sample

# Each teacher's measurement takes about as long, or as long as a batch does.
SAMPLE_SECONDS = 20.0
# Rows are measured by length, in groups that each hold as many tokens: a token of a long row takes longer.
_GROUPS = 4
# How far, at least, the pace of some seconds may be from that of hours.
_UNSURE = 0.15
_ROWS_FOR_SIZES = 1000


def estimate_scoring(
    dataset: Dataset,
    teacher: Any,
    options: ScoringOptions,
    teacher_column: str | None = None,
    ref_model: Any = None,
    **given: Any,
) -> dict[str, Any]:
    """
    Estimates what [`score_rollouts`] will take, by scoring rows of all lengths for about 20 seconds a teacher, or one
    prompt's rows of each of four lengths, if that takes longer.

    Args:
        dataset, teacher, teacher_column, ref_model, **given: As in [`score_rollouts`].
        options ([`ScoringOptions`]): Options of the scoring.

    Returns:
        `dict`: `rows`, `prompt_tokens`, `completion_tokens`, `longest_row` (tokens), `shards`, `processes`; `bytes`,
        the size on disk of each column of the finished table; `models`, for each teacher its rows, its tokens and what
        was measured; `seconds`, the least and the most that the run is expected to take; `memory_bytes`, the peak of
        this process, and of its CUDA devices if there are any, during the measurement.

    Raises:
        TableError, ServerError, ValueError: As [`score_rollouts`], before anything is scored.
    """
    dataset, scorers = scorers_of(dataset, teacher, teacher_column, ref_model, options, **given)
    _reset_peak()
    models, sizes = {}, Counter(_bytes_of_rows(dataset))
    for name, (rows, scorer) in scorers.items():
        with naming(name) if name is not None else nullcontext():
            models[name or "teacher"], added = _measure_scoring(rows, scorer)
        sizes.update(added)
        scorer.unload()
    prompts, completions = lengths(dataset)
    return {
        "run": "estimate of scoring",
        "rows": len(dataset),
        "prompt_tokens": int(prompts.sum()),
        "completion_tokens": int(completions.sum()),
        "longest_row": int((prompts + completions).max()),
        "shards": -(-len(dataset) // options.rows_per_shard),
        "bytes": {name: (round(size), round(size)) for name, size in sizes.items()},
        **_total(models),
    }


def _measure_scoring(dataset: Dataset, scorer: Scorer) -> tuple[dict[str, Any], dict[str, float]]:
    """Measures a teacher on some of its rows: the measurement, and the bytes of the columns that it adds."""
    scorer.settle_budget(None)
    tokens = np.add(*lengths(dataset))
    scored, spent, seconds, widest = [], 0.0, np.zeros(2), 0
    # The first rows wait for the model to be loaded and tested.
    scorer.score(dataset.select([int(tokens.argmin())]), np.array([tokens.argmin()]), lambda tokens: None)
    for group in _groups_by_length(dataset, tokens):
        times, counts = [], []
        for rows in _growing(group, SAMPLE_SECONDS / _GROUPS):
            start = time.perf_counter()
            scored.append(scorer.score(take(dataset, rows), rows, lambda tokens: None))
            times.append(time.perf_counter() - start)
            counts.append(tokens[rows].sum())
            spent += times[-1]
            widest = max(widest, len(rows) * int(tokens[rows].max()))
        of_group = tokens[np.concatenate(group)].sum()
        # The last call had most rows, which is nearest to the run. It also has costs of its own, which a shard has
        # once: without them, a token costs what the last call took longer by.
        paces = [times[-1] / counts[-1]]
        if len(times) > 1 and counts[-1] > counts[-2] and times[-1] > times[-2]:
            paces.append((times[-1] - times[-2]) / (counts[-1] - counts[-2]))
        seconds += of_group * np.array([min(paces), max(paces)])
    seconds *= 1 - _UNSURE, 1 + _UNSURE
    table = concatenate_datasets(scored)
    sampled = int(np.add(*lengths(table)).sum())
    measured = {
        "rows": len(dataset),
        "tokens": int(tokens.sum()),
        "measured_rows": len(table),
        "measured_tokens": sampled,
        "tokens_per_second": float(sampled / spent),
        "seconds": tuple((_largest_share(tokens, scorer.options.rows_per_shard) * seconds).tolist()),
    }
    if not scorer.is_served:
        most = scorer.max_batch_tokens
        measured |= {"tokens_at_once": min(widest, most), "max_batch_tokens": most}
    added = table.select_columns([name for name in table.column_names if name not in dataset.column_names])
    share = lengths(dataset)[1].sum() / lengths(table)[1].sum()
    return measured, _column_bytes(added, share)


def _groups_by_length(dataset: Dataset, tokens: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yields groups of like length and as many tokens. Each is a list of rows that are read together: consecutive
    ones of one prompt, which is then read once."""
    prompts = prompt_and_row_hashes(dataset)[0]
    starts = np.flatnonzero(np.append(True, prompts[1:] != prompts[:-1]) | (np.arange(len(prompts)) % 64 == 0))
    units = np.split(np.arange(len(prompts)), starts[1:])
    order = np.argsort(np.maximum.reduceat(tokens, starts), kind="stable")
    ends = np.cumsum(np.add.reduceat(tokens, starts)[order])
    cuts, middles = (
        np.searchsorted(ends, ends[-1] * np.arange(first, 2 * _GROUPS, 2) / (2 * _GROUPS)) for first in (0, 1)
    )
    for start, middle, stop in zip(cuts, middles, [*cuts[1:], len(order)], strict=True):
        if start < stop:
            # From the unit where half of the group's tokens are, whose length is most like theirs.
            yield [units[unit] for unit in np.roll(order[start:stop], start - min(middle, stop - 1))]


def _growing(units: list[np.ndarray], seconds: float) -> Iterator[np.ndarray]:
    """Yields rows of one unit, then of twice as many others, and so on, until the next would take too long."""
    start, done, size = time.perf_counter(), 0, 1
    while done + size <= len(units):
        before = time.perf_counter()
        yield np.concatenate(units[done : done + size])
        done, size = done + size, 2 * size
        if 2 * (time.perf_counter() - before) > seconds - (time.perf_counter() - start):
            return


def estimate_rollouts(
    prompts: Dataset,
    model: Any,
    role: str,
    options: RolloutOptions,
    teacher_column: str | None = None,
    ref_logprobs: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """
    Estimates what [`collect_rollouts`] or [`generate_sft_data`] will take, by sampling a batch of answers of growing
    length for about 20 seconds a model, or their first tokens, if that takes longer. How long the answers that did not
    end in this time will become is not known: all sums are from what was seen to `max_completion_length`.

    Args:
        prompts, model, teacher_column, ref_logprobs, **given: As in [`collect_rollouts`] and [`generate_sft_data`].
        role (`str`): `"student"` or `"teacher"`.
        options ([`RolloutOptions`]): Options of the sampling.

    Returns:
        `dict`: `rows` and `prompt_tokens` of the answers, `longest_row` (tokens, at most), `shards`, `processes`;
        `completion_tokens`, the `bytes` of each column and `seconds`, each as the least and the most; `models` and
        `memory_bytes` as of [`estimate_scoring`].

    Raises:
        ServerError, TableError, ValueError: As [`collect_rollouts`], before anything is sampled.
    """
    prompts, answerers = answerers_of(prompts, model, role, options, teacher_column, ref_logprobs, **given)
    _reset_peak()
    models, tokens, sizes, prompt_lengths = {}, np.zeros(2), {}, []
    for name, (rows, columns) in answerers.items():
        with naming(name) if name is not None else nullcontext():
            prompt_ids = [ids for batch in rows.iter(1000) for ids in columns.model.encode(batch)]
            models[name or role], added = _measure_sampling(rows, prompt_ids, columns)
        prompt_lengths += map(len, prompt_ids)
        tokens += models[name or role]["completion_tokens"]
        for column, size in added.items():
            sizes[column] = sizes.get(column, 0) + size
        columns.model.unload()
    return {
        "run": "estimate of sampling",
        "rows": len(prompts) * options.num_generations,
        "prompt_tokens": sum(prompt_lengths) * options.num_generations,
        "completion_tokens": _whole(tokens),
        "longest_row": max(prompt_lengths) + options.max_completion_length,
        "shards": -(-len(prompts) // options.rows_per_shard),
        "bytes": {name: _whole(size) for name, size in sizes.items()},
        **_total(models),
    }


def _measure_sampling(
    prompts: Dataset, prompt_ids: list[list[int]], columns: AnswerColumns
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measures a model on some of its prompts: the measurement, and the least and most bytes of each column."""
    options, most = columns.model.options, columns.model.options.max_completion_length
    sizes = np.array(list(map(len, prompt_ids)))
    # Prompts of all lengths, in a batch such as those of the run.
    count = min(len(prompts), options.batch_size)
    rows = np.argsort(sizes, kind="stable")[np.linspace(0, len(prompts) - 1, count).astype(int)]
    given = [prompt_ids[row] for row in rows]
    times, samples = _sample_longer_and_longer(columns, given)
    answer_lengths = np.array([len(sample.ids) for sample in samples])
    ended = np.array([sample.finish_reason == "stop" for sample in samples]) | (answer_lengths >= most)
    answers = len(prompts) * options.num_generations
    ends_at = [answer_lengths, np.where(ended, answer_lengths, most)]
    # Two standard errors, because other prompts have other answers.
    error = np.array([-2, 2]) * [values.std() / np.sqrt(count) for values in ends_at]
    tokens = answers * np.clip([values.mean() for values in ends_at] + error, 1, most)
    limit, seconds = list(times.items())[-1]
    if columns.model.engine == "transformers":
        # A batch takes as many steps as its longest answer has tokens.
        steps = np.array([answer_lengths.max(), most if not ended.all() else answer_lengths.max()])
        shorter = max((length for length in times if length < limit), default=0)
        reached = int(answer_lengths.max())
        pace = max(0.0, seconds - times.get(shorter, 0.0)) / max(1, reached - shorter)
        shards = range(0, len(prompts), options.rows_per_shard)
        in_shards = [min(options.rows_per_shard, len(prompts) - start) * options.num_generations for start in shards]
        batches = np.array([-(-in_shard // options.batch_size) for in_shard in in_shards])
        total = batches.sum() * (seconds + pace * (steps - reached))
    else:
        total = tokens * seconds / answer_lengths.sum()
    total *= 1 - _UNSURE, 1 + _UNSURE
    table = columns(take(prompts, rows), given, samples)
    # Of answers, the tokens decide how long a column is; of prompts, the rows do.
    of_prompts = [
        name for name in table.column_names if name in (*prompts.column_names, "prompt_ids", "finish_reason")
    ]
    of_answers = table.remove_columns(of_prompts)
    sizes_on_disk = _column_bytes(table.select_columns(of_prompts), np.full(2, answers / count))
    sizes_on_disk |= _column_bytes(of_answers, tokens / answer_lengths.sum())
    return {
        "rows": answers,
        "completion_tokens": _whole(tokens),
        "measured_rows": count,
        "measured_tokens": int(answer_lengths.sum()),
        "measured_length": limit,
        "ended": int(ended.sum()),
        "tokens_per_second": float(answer_lengths.sum() / seconds),
        "seconds": tuple((_largest_share(sizes, options.rows_per_shard) * total).tolist()),
    }, sizes_on_disk


def _sample_longer_and_longer(
    columns: AnswerColumns, prompt_ids: list[list[int]]
) -> tuple[dict[int, float], list[Sample]]:
    """Samples answers of at most twice the length each time, until all end or the next would take too long: the
    seconds by length, and the answers of the last."""
    sampling, times = columns.model.sampling, {}
    # The first tokens wait for the model to be loaded and tested.
    columns.sample(prompt_ids, replace(sampling, max_completion_length=1))
    limit = min(8, sampling.max_completion_length)
    while True:
        start = time.perf_counter()
        samples = columns.sample(prompt_ids, replace(sampling, max_completion_length=limit))
        times[limit] = time.perf_counter() - start
        is_done = limit == sampling.max_completion_length or all(s.finish_reason == "stop" for s in samples)
        if is_done or sum(times.values()) + 2 * times[limit] > SAMPLE_SECONDS:
            return times, samples
        limit = min(2 * limit, sampling.max_completion_length)


def _bytes_of_rows(dataset: Dataset) -> dict[str, float]:
    """Returns the bytes on disk of each column of the rows, from some of all over them."""
    count = min(len(dataset), _ROWS_FOR_SIZES)
    rows = np.linspace(0, len(dataset) - 1, count).astype(int)
    return _column_bytes(take(dataset, rows), len(dataset) / count)


def _column_bytes(sample: Dataset, scale: float | np.ndarray) -> dict[str, Any]:
    """Returns the bytes of each column on disk, of a table that is so many times as large as the sample."""
    first, whole = (_parquet_bytes(take(sample, range(rows))) for rows in (1, len(sample)))
    # What a column takes that has hardly any values does not grow with them.
    return {name: size + (size - first[name]) * (scale - 1) for name, size in whole.items()}


def _parquet_bytes(table: Dataset) -> dict[str, int]:
    file = io.BytesIO()
    write_parquet(table.data.table, file, {})
    metadata, sizes = pq.read_metadata(file), Counter()
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            sizes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    return sizes


def _largest_share(sizes: np.ndarray, rows_per_shard: int) -> float:
    """Returns the largest share that a process of this launch has of all that there is to do."""
    of_shards = np.add.reduceat(sizes, np.arange(0, len(sizes), rows_per_shard))
    count = processes().num_processes
    return max(of_shards[process::count].sum() for process in range(count)) / of_shards.sum()


def _whole(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _total(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns what is known when all models have been measured. They run one after another."""
    seconds = np.sum([measured["seconds"] for measured in models.values()], axis=0)
    return {
        "processes": processes().num_processes,
        "models": models,
        "seconds": tuple(float(value) for value in seconds),
        "memory_bytes": _peak_bytes(),
    }


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


def _reset_peak() -> None:
    for device in _devices():
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes() -> dict[str, int]:
    """Returns the most memory that this process has had, and that PyTorch has had on each CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    return peak | {f"cuda:{device}": torch.cuda.max_memory_allocated(device) for device in _devices()}


# ---- As text ----


def describe(estimate: dict[str, Any]) -> list[str]:
    """Returns an estimate as lines of text."""
    completions, at_most = estimate["completion_tokens"], ""
    if isinstance(completions, tuple):
        completions, at_most = _between(completions, _count), "at most "
    else:
        completions = f"{completions:,}"
    sizes = sorted(estimate["bytes"].items(), key=lambda item: -item[1][1])
    whole = tuple(sum(size[i] for _, size in sizes) for i in range(2))
    largest = [f"{name} {_between(size, _size)}" for name, size in sizes if size[1] >= 0.01 * whole[1]]
    rows = f"{estimate['rows']:,} rows, {estimate['prompt_tokens']:,} prompt tokens, {completions} completion tokens"
    shards = f"{estimate['shards']:,} {'shard' if estimate['shards'] == 1 else 'shards'}"
    lines = [
        f"{rows}; the longest row has {at_most}{estimate['longest_row']:,} tokens.",
        f"On disk: {_between(whole, _size)} in {shards} ({', '.join(largest)}).",
    ]
    for name, model in estimate["models"].items():
        line = (
            f"{name}: {model['rows']:,} rows in {_between(model['seconds'], _duration)}, after "
            f"{model['measured_tokens']:,} tokens of {model['measured_rows']:,} rows at "
            f"{model['tokens_per_second']:,.0f} tokens/s"
        )
        if "ended" in model:
            line += f"; {model['ended']:,} of them ended within {model['measured_length']:,} tokens"
        if "max_batch_tokens" in model:
            line += f"; up to {model['tokens_at_once']:,} tokens at once, of at most {model['max_batch_tokens']:,}"
        lines.append(line + ".")
    memory = ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in estimate["memory_bytes"].items())
    lines.append(
        f"In all {_between(estimate['seconds'], _duration)} with {estimate['processes']} "
        f"{'process' if estimate['processes'] == 1 else 'processes'}. Peak memory so far: {memory}."
    )
    return lines


def _between(values: tuple[float, float], say: Callable[[float], str]) -> str:
    low, high = map(say, values)
    return f"about {low}" if low == high else f"{low} to {high}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _size(value: float) -> str:
    power = min(3, int(math.log(max(1, value), 1000)))
    return f"{value / 1000**power:,.{power > 0:d}f} {('B', 'kB', 'MB', 'GB')[power]}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
