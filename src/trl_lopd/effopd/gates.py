"""Gates of EffOPD, which measure how good weights are. A gate always uses the same rows to compare weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.data_utils import is_conversational

from ..generation.options import GREEDY_DEFAULTS, DecodingOptions, takes
from ..generation.prompts import encode_prompts
from ..generation.samplers import TransformersSampler
from ..models import eos_token_ids
from ..table.schema import TableRows
from ..training.criteria import direction

if TYPE_CHECKING:
    from torch import nn


class ReverseKLGate:
    """
    Default gate: the reverse KL divergence on the teacher's stored top-k tokens, in nats per token, one value per row.

    Args:
        trainer ([`OfflineOPDTrainer`]): The trainer of the model.
        rows ([`~datasets.Dataset`]): Held-out rows with top-k columns.

    Attributes:
        teacher_ids (`(rows,)` array, *optional*): The column `teacher_id`, where the rows have it.
    """

    greater_is_better = False

    def __init__(self, trainer: Trainer, rows: Dataset):
        self.trainer, self.rows = trainer, rows
        self.teacher_ids = TableRows(rows).teacher_ids

    def __call__(self, model: nn.Module) -> np.ndarray:
        with _muted(self.trainer):
            return self.trainer.reverse_kl_of_rows(self.rows)


class MetricGate:
    """
    Gate on a metric of `trainer.evaluate()`, without its logs and events.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer of the model.
        key (`str`): Name of the metric, for instance `"eval_loss"`.
        rows ([`~datasets.Dataset`], *optional*): Rows to evaluate on, instead of the trainer's `eval_dataset`.
        greater_is_better (`bool`, *optional*): Required for a metric that [`criteria.direction`] does not know.

    Raises:
        ValueError: If the metric does not tell which model is better, or its direction is not known.
    """

    def __init__(self, trainer: Trainer, key: str, rows: Dataset | None = None, greater_is_better: bool | None = None):
        self.trainer, self.key, self.rows = trainer, key, rows
        ours, sampled = hasattr(trainer, "reverse_kl_of_rows"), getattr(trainer, "loss_type", None) == "sampled"
        self.greater_is_better = direction(key, greater_is_better, ours=ours, sampled=ours and sampled)

    def __call__(self, model: nn.Module) -> float:
        with _muted(self.trainer):
            metrics = self.trainer.evaluate(self.rows)
        if self.key not in metrics:
            raise ValueError(f"The gate {self.key!r} is none of what `evaluate` gives: {', '.join(sorted(metrics))}.")
        return metrics[self.key]


class RewardGate:
    """
    Gate of the paper: the student answers a few prompts, and the answers are graded; one value per prompt.

    Every call samples with the same seeds. The prompts are distributed over the processes.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer of the model that answers.
        prompts ([`~datasets.Dataset`]): Prompts in a `prompt` column of texts or of message lists; the other columns
            are passed to the reward functions. The paper uses 50.
        reward_funcs (`Callable` or `list`): Reward functions as in TRL's `GRPOTrainer`: called with `prompts`,
            `completions`, `completion_ids` and the other columns, all lists; return a list of numbers. Rewards of
            several functions are added up.
        **options: The fields of [`~generation.options.DecodingOptions`]: `max_completion_length` (1024), `temperature`
            (0: greedy), `top_p` (1), `stop`, `batch_size`, `seed`, `chat_template_kwargs`.
    """

    greater_is_better = True

    @takes(DecodingOptions, **GREEDY_DEFAULTS, max_completion_length=1024)
    def __init__(
        self,
        trainer: Trainer,
        prompts: Dataset,
        reward_funcs: Callable[..., list[float]] | Sequence[Callable[..., list[float]]],
        *,
        options: DecodingOptions,
    ):
        if "prompt" not in prompts.column_names or len(prompts) == 0:
            raise ValueError(
                f"`prompts` has a `prompt` column and at least one row; got {len(prompts)} rows with the columns "
                f"{prompts.column_names}."
            )
        self.trainer, self.prompts, self.options = trainer, prompts, options
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)

    def __call__(self, model: PreTrainedModel) -> list[float]:
        tokenizer: PreTrainedTokenizerBase = self.trainer.processing_class
        state = self.trainer.accelerator
        # Every process gets the same number of prompts, because a sharded model makes collective calls. Some prompts
        # are repeated for that; their rewards are dropped below.
        share = math.ceil(len(self.prompts) / state.num_processes)
        indices = [(state.process_index * share + i) % len(self.prompts) for i in range(share)]
        rows = self.prompts[indices]
        prompts = rows.pop("prompt")
        sampling = self.options.sampling(eos_token_ids(model, tokenizer))
        sampler = TransformersSampler(model, tokenizer, self.options.batch_size)
        ids = encode_prompts({"prompt": prompts, **rows}, tokenizer, **(self.options.chat_template_kwargs or {}))
        samples = sampler.sample(ids, sampling, first=state.process_index * share)
        completions: list[Any] = tokenizer.batch_decode([s.ids for s in samples], skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        kwargs = {"prompts": prompts, "completions": completions, "completion_ids": [s.ids for s in samples], **rows}
        # As in TRL, a function that does not apply to an answer gives `None`, which adds nothing.
        graded = [[0.0 if r is None else r for r in grade(**kwargs)] for grade in self.reward_funcs]
        rewards = np.sum(np.asarray(graded, dtype=float), axis=0)
        rewards = gather_object([rewards.tolist()]) if state.num_processes > 1 else [rewards.tolist()]
        return [reward for process_rewards in rewards for reward in process_rewards][: len(self.prompts)]


def resolve_gate(
    trainer: Trainer, gate: Any, rows: Dataset | None, num_rows: int, greater_is_better: bool | None = None
) -> Callable[[nn.Module], Any]:
    """
    Returns the gate for the `gate` argument of an [`EffOPDCallback`], or the default one.

    Raises:
        ValueError: If there are no rows for the default gate, or the metric is misleading.
    """
    if callable(gate):
        if rows is not None:
            raise ValueError(
                "`gate_dataset` is for the default gate and for metrics: a gate of your own has its data."
            )
        return gate
    if gate is not None:
        return MetricGate(trainer, gate, rows, greater_is_better)
    rows = trainer.eval_dataset if rows is None else rows
    is_table = isinstance(rows, Dataset)
    if (
        not hasattr(trainer, "reverse_kl_of_rows")
        or not is_table
        or "teacher_topk_ids" not in rows.column_names
        or len(rows) < 2
    ):
        given = f"{len(rows)} rows with the columns {rows.column_names}" if is_table else f"a `{type(rows).__name__}`"
        raise ValueError(
            "The default gate compares two or more held-out rows of a `Dataset` that have the teacher's top-k "
            "(`score_rollouts(..., top_k=8)`), in an `OfflineOPDTrainer`: give them as its `eval_dataset` or as the "
            f"callback's `gate_dataset`; got {'no rows' if rows is None else given} and a `{type(trainer).__name__}`. "
            'Or give a gate: a key of `evaluate()` such as "eval_loss", a `RewardGate`, or a function of the model.'
        )
    return ReverseKLGate(trainer, rows.select(range(min(num_rows, len(rows)))))


def paired_p_value(gains: np.ndarray, flips: int = 1999) -> float:
    """
    Computes the p-value of a sign-flip test: the chance of a mean gain that is as large or larger if a gain and a loss
    were equally likely on each row.

    It makes no assumption on the distribution of gains, except that rows are independent. The result is between
    1 / (flips + 1) and 1.

    Args:
        gains (`(rows,)` array): By how much each row is better.
        flips (`int`, *optional*, defaults to `1999`): Number of random sign patterns, the same in each call.
    """
    rng = np.random.default_rng(0)
    as_large = 0
    # Sums of the same gains in another order differ by rounding, and ties count.
    least = gains.sum() - 1e-9 * np.abs(gains).sum()
    for _ in range(flips):
        signs = 2 * rng.integers(0, 2, len(gains), dtype=np.int8) - 1
        as_large += float(signs @ gains) >= least
    return float((1 + as_large) / (1 + flips))


@contextmanager
def _muted(trainer: Trainer) -> Iterator[None]:
    """Disables logs, progress bars and callbacks inside a `with` block, since callbacks might stop training or choose
    the best model."""
    handler, callbacks = trainer.callback_handler, trainer.callback_handler.callbacks
    # TRL's trainers collect metrics in this attribute and log them with the next training metrics.
    collected = copy.deepcopy(vars(trainer).get("_metrics"))
    handler.callbacks = []
    trainer.log = lambda *args, **kwargs: None
    # With persistent workers, `Trainer` would use one dataloader for all evaluations, also on other rows.
    persistent, trainer.args.dataloader_persistent_workers = trainer.args.dataloader_persistent_workers, False
    try:
        yield
    finally:
        handler.callbacks = callbacks
        trainer.args.dataloader_persistent_workers = persistent
        del trainer.log
        if collected is not None:
            trainer._metrics = collected
