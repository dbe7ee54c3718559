"""Metrics of an evaluation that may select the best model or serve as a gate, and the direction of each."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from datasets import Dataset

from ..table.schema import TableRows, rows_of_each

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# Metrics of `OfflineOPDTrainer.evaluate` on held-out rows, and whether higher is better; see `objective.summarize`.
_CRITERIA = {"reverse_kl_topk": False, "loss": False, "top1_agreement": True}
# Its other metrics. On frozen rollouts these can fall, rise or go to infinity while the student gets worse.
_NOT_CRITERIA = (
    *("huber", "frozen_log_ratio", "k3", "entropy", "mean_token_accuracy", r"advantage/\w+", r"importance_weight/\w+"),
    # Its weights are those of the tokens that the rollouts have: mass that moves elsewhere is not seen.
    *("reverse_kl_weighted", "truncated_completions", "padding"),
)
# Metrics that `Trainer` adds for any model, and TRL's trainers for mixtures of experts.
_NO_QUALITY = (
    "aux_loss",
    *("runtime", "samples_per_second", "steps_per_second", "tokens_per_second", "epoch", "num_input_tokens_seen"),
    *("model_preparation_time", "jit_compilation_time", r"mem_\w+"),
)


def direction(metric: str, greater_is_better: bool | None = None, *, ours: bool = True, sampled: bool = False) -> bool:
    """
    Returns whether higher values of a metric are better, for choosing between models.

    Args:
        metric (`str`): Name of the metric, with or without `eval_` and the name of an evaluation dataset.
        greater_is_better (`bool`, *optional*): The user's setting. Required for metrics that are not known here.
        ours (`bool`, *optional*, defaults to `True`): Whether an [`OfflineOPDTrainer`] evaluates. For other trainers,
            only `loss` is known.
        sampled (`bool`, *optional*, defaults to `False`): Whether `loss` is that of the sampled objective.

    Raises:
        ValueError: If the metric does not tell which model is better, if `greater_is_better` contradicts the known
            direction, or if it is required and missing.
    """
    refused = (*_NO_QUALITY, *(_NOT_CRITERIA if ours else ()), *(("loss",) if sampled else ()))
    if _is_one_of(metric, refused):
        raise ValueError(
            f"{metric!r} does not tell whether the student got better: it can improve while the student gets worse. "
            "Select by 'eval_reverse_kl_topk' on held-out rows with the teacher's top-k (`score_rollouts(..., "
            "top_k=8)`). A gate of EffOPD can also grade answers: `RewardGate`."
        )
    for name, higher in _CRITERIA.items() if ours else [("loss", False)]:
        if _is_one_of(metric, (name,)):
            if greater_is_better not in (None, higher):
                raise ValueError(
                    f"{metric!r} is better if {'greater' if higher else 'lower'}: leave `greater_is_better` unset."
                )
            return higher
    if greater_is_better is None:
        near = difflib.get_close_matches(metric.split("/")[-1].removeprefix("eval_"), _CRITERIA, n=1)
        hint = f"Did you mean {near[0]!r}? For a metric of your own," if near and ours else "For one of your own,"
        raise ValueError(
            f"{metric!r} is no metric that is known here. {hint} set `greater_is_better` to say whether higher is "
            "better."
        )
    return greater_is_better


def is_known(metric: str) -> bool:
    """Returns whether [`OfflineOPDTrainer`] or `Trainer` logs a metric, in training or in evaluation."""
    logged = ("learning_rate", "grad_norm", "total_flos", "train_loss")
    return _is_one_of(metric, (*_CRITERIA, *_NOT_CRITERIA, *_NO_QUALITY, *logged))


def _is_one_of(metric: str, names: tuple[str, ...]) -> bool:
    return re.search(rf"(^|[_/])({'|'.join(names)})$", metric) is not None


def choose_best_model_metric(
    args: TrainingArguments, loss_type: str, eval_columns: dict[str, set[str]], several: bool
) -> None:
    """
    Sets the default `metric_for_best_model`, or warns if the user's is misleading.

    Args:
        args ([`OfflineOPDConfig`]): The arguments, which are changed.
        loss_type (`str`): The objective.
        eval_columns (`dict[str, set[str]]`): Columns of each evaluation dataset, by its name.
        several (`bool`): Whether several datasets are evaluated, so that names of metrics contain that of a dataset.

    Raises:
        ValueError: If several datasets are evaluated and `load_best_model_at_end` is set without
            `metric_for_best_model`.
    """
    if several and args.metric_for_best_model_is_default and args.load_best_model_at_end:
        name = next(iter(eval_columns))
        raise ValueError(
            "With several evaluation datasets, `load_best_model_at_end` needs `metric_for_best_model` to say which "
            f"one decides, for instance 'eval_{name}_reverse_kl_topk'."
        )
    has_topk = not several and any("teacher_topk_ids" in columns for columns in eval_columns.values())
    if args.metric_for_best_model_is_default and has_topk:
        args.metric_for_best_model, args.greater_is_better = "eval_reverse_kl_topk", False
    elif args.load_best_model_at_end and loss_type == "sampled" and args.metric_for_best_model.endswith("loss"):
        logger.warning(
            "The best model is chosen by the loss of the sampled objective, the Huber value, which can fall while the "
            "student gets worse. Score the evaluation rows with `top_k=8` and leave `metric_for_best_model` unset."
        )


def refuse_absent_metric(
    args: TrainingArguments,
    eval_datasets: Mapping[str, Dataset | IterableDataset],
    eval_columns: Mapping[str, set[str]],
    several: bool,
) -> None:
    """
    Checks that evaluations will give `metric_for_best_model`, if it is a metric of [`OfflineOPDTrainer`].

    Args:
        args ([`OfflineOPDConfig`]): The arguments.
        eval_datasets (`dict`): The evaluation datasets by name.
        eval_columns (`dict[str, set[str]]`): Columns of each of them.
        several (`bool`): Whether several datasets are evaluated, so that names of metrics contain that of a dataset.

    Raises:
        ValueError: If no evaluation gives the metric. Without this, `Trainer` would raise at the first one.
    """
    metric = args.metric_for_best_model
    if metric is None or not _is_one_of(metric, tuple(_CRITERIA)) or args.eval_strategy == "no" or not eval_columns:
        return
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    possible: list[str] = []
    for name, columns in eval_columns.items():
        prefix = f"eval_{name}_" if several else "eval_"
        criteria = [criterion for criterion in _CRITERIA if criterion == "loss" or "teacher_topk_ids" in columns]
        teachers: list[str] = []
        if isinstance(eval_datasets[name], Dataset):
            teachers = list(rows_of_each(TableRows(eval_datasets[name]).teacher_ids))
        elif re.fullmatch(rf"{re.escape(prefix)}.+/({'|'.join(criteria)})", metric):
            return  # the teachers of a stream are not known yet
        possible += [
            prefix + of + criterion for of in ("", *(f"{name}/" for name in teachers)) for criterion in criteria
        ]
    if metric not in possible:
        near = difflib.get_close_matches(metric, possible, n=1)
        raise ValueError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r}, and of such metrics an evaluation here gives "
            f"only {', '.join(map(repr, possible))}.{f' Did you mean {near[0]!r}?' if near else ''}"
        )
