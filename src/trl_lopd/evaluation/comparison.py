"""Comparison of several models on the same problems."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from ..generation.options import GREEDY_DEFAULTS, DecodingOptions, takes
from ..processes import processes, wait_for_everyone
from .evaluate import evaluate_model


@takes(DecodingOptions, **GREEDY_DEFAULTS, batch_size=256)
def compare_models(
    models: dict[str, str],
    benchmark: Dataset,
    output_dir: str | Path,
    *,
    name: str = "benchmark",
    answer_after: str = "#",
    teacher: str | None = None,
    held_out: dict[str, float] | None = None,
    revisions: dict[str, str | None] | None = None,
    trust_remote_code: bool = False,
    options: DecodingOptions,
) -> list[dict[str, Any]]:
    """
    Evaluates models one after another, all processes together, and prints a table.

    Args:
        models (`dict[str, str]`):
            Directories or Hub ids, by the names of the models in the table.
        benchmark ([`~datasets.Dataset`]):
            `prompt` and `answer`, see [`load_benchmark`]; graded by [`~metrics.grade_exact`].
        output_dir (`str` or `Path`):
            Directory for the results. Answers and metrics are written to `evaluations` in it and replace earlier ones;
            the table is written to `report.json`.
        name (`str`, *optional*, defaults to `"benchmark"`):
            Name of the benchmark in the results.
        answer_after (`str`, *optional*, defaults to `"#"`):
            Marker of the answer, which is the text after the last one in a completion.
        teacher (`str`, *optional*):
            Teacher to measure the reverse KL divergence of all models but itself from.
        held_out (`dict[str, float]`, *optional*):
            Reverse KL divergence of some of the models on held-out rows, in nats per token, to show in the table.
        revisions (`dict[str, str]`, *optional*):
            Hub revisions of some of the models.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run the code that comes with the models.
        **options:
            The fields of [`~generation.options.DecodingOptions`]; `temperature` is 0, greedy, by default.

    Returns:
        `list[dict]`: One row per model: `model`, `accuracy`, `held_out`, and with a teacher `fresh` and `fresh_se`,
        the divergence on fresh rollouts and its standard error, in nats per sequence.

    Raises:
        ValueError: If `revisions` names no model of `models`, or as in [`evaluate_model`].
    """
    if unknown := [label for label in revisions or {} if label not in models]:
        raise ValueError(f"`revisions` has {unknown[0]!r}, which is none of `models`: {', '.join(models)}.")
    state, rows, output_dir = processes(), [], Path(output_dir)
    for (label, path), directory in zip(models.items(), _directories(models, output_dir), strict=True):
        if state.is_main_process:
            print(f"Evaluating: {label}", flush=True)
            shutil.rmtree(directory, ignore_errors=True)  # results of another run
        wait_for_everyone(state)
        metrics = evaluate_model(
            path,
            benchmark,
            metric="exact_answer",
            name=name,
            answer_after=answer_after,
            teacher=teacher if path != teacher else None,
            output_dir=directory,
            revision=(revisions or {}).get(label),
            trust_remote_code=trust_remote_code,
            **vars(options),
        )["metrics"]
        row = {
            "model": label,
            "accuracy": metrics["exact_answer"]["value"],
            "held_out": (held_out or {}).get(label),
        }
        if "reverse_kl" in metrics:
            row["fresh"], row["fresh_se"] = metrics["reverse_kl"].values()
        rows.append(row)
    if state.is_main_process:
        _show(rows, len(benchmark), "greedy accuracy" if options.temperature == 0 else "accuracy")
        path = output_dir / "report.json"
        path.write_text(json.dumps(rows, indent=2))
        print(f"The table is also in {path}")
    return rows


def _directories(labels: Iterable[str], output_dir: Path) -> list[Path]:
    """Returns a directory for each label, none of which is that of another or holds others."""
    names: list[str] = []
    for label in labels:
        base = name = re.sub(r"\W+", "-", label).strip("-").lower() or "model"
        number = 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return [output_dir / "evaluations" / name for name in names]


def _show(rows: list[dict[str, Any]], problems: int, accuracy: str) -> None:
    table = Table(
        *("model", accuracy, "reverse KL, fresh rollouts\n(nats a sequence)"),
        "reverse KL, held-out top-k\n(nats a token)",
        title=f"{problems} held-out prompts",
    )
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['accuracy']:.3f}",
            f"{row['fresh']:.2f} ± {row['fresh_se']:.2f}" if "fresh" in row else "–",
            f"{row['held_out']:.4f}" if row["held_out"] is not None else "–",
        )
    Console(width=100).print(table)
