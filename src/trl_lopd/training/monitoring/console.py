"""Console output of a run: a few metrics. Reporters and `log_history` get every metric."""

from __future__ import annotations

import sys
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from ..criteria import is_known

# Metrics that are shown, with their names in a line, and the shorter ones beside a progress bar of 80 columns.
_SHOWN = {
    "loss": ("loss", "loss"),
    "reverse_kl_topk": ("reverse KL", "KL"),
    "entropy": ("entropy", "entropy"),
    "importance_weight/ess": ("importance ESS", "ESS"),
    "learning_rate": ("learning rate", "lr"),
    "grad_norm": ("gradient norm", "grad"),
}


class ConsoleCallback(ProgressCallback):
    """
    Callback that shows the six metrics of `_SHOWN` beside the progress bar of transformers. Without a bar, because the
    output is not a terminal or `disable_tqdm` is set, it prints a line per log. Each evaluation is a line. Metrics
    that [`OfflineOPDTrainer`] does not log, such as those of other callbacks, are shown too. Before the first step it
    prints what the training will take.

    Args:
        trainer ([`OfflineOPDTrainer`]): The trainer, with its model, which no engine has divided yet.
    """

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer
        parameters = list(trainer.model.parameters())
        self.weights = sum(parameter.nbytes for parameter in parameters)
        self.trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if state.is_world_process_zero:
            _write(self._costs(args, state, len(train_dataloader) if _is_table(self.trainer) else None))
        if _has_bars(args):
            super().on_train_begin(args, state, control, **kwargs)

    def _costs(self, args, state, batches: int | None) -> str:
        """Returns what the training will take. Engines that divide a model decide themselves what they keep of it."""
        said = "A stream, whose rows and tokens are not known beforehand"
        if batches is not None:
            row_lengths = self.trainer.rows.row_lengths
            said = f"{len(row_lengths):,} rows of {row_lengths.sum():,} tokens, at most {row_lengths.max():,} a row"
        said += f"; {state.max_steps:,} optimizer step{'s' * (state.max_steps != 1)}"
        if batches is not None:
            passes = f"{state.max_steps * args.gradient_accumulation_steps / batches:.3g}"
            said += f", {passes} pass{'es' * (passes != '1')}"
        if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            return f"{said}."
        # Adam has two numbers for each that is trained; what other optimizers keep is not known here.
        is_adam = str(getattr(args.optim, "value", args.optim)) in ("adamw_torch", "adamw_torch_fused")
        of_optimizer = 2 * self.trained if is_adam else 0
        memory = self.weights + self.trained + of_optimizer
        said += (
            f". Weights{', gradients and Adam' if is_adam else ' and gradients'}: {_gigabytes(memory)} in each process"
        )
        if saves := _count_saves(args, state):
            size = (self.trained if is_peft_model(self.trainer.model) else self.weights) + of_optimizer * (
                not args.save_only_model
            )
            said += f"; checkpoints on disk: {saves:,} x {_gigabytes(size)}"
        return f"{said}."

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if _has_bars(args):
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        step = f"step {state.global_step}"
        if "loss" in logs:
            if self.training_bar is not None:
                self.training_bar.set_postfix_str(_numbers(logs, short=True))
            else:
                _write(f"{step}/{state.max_steps}: {_numbers(logs)}")
        elif "train_runtime" in logs:
            if self.training_bar is None:
                _write(f"{state.global_step} steps in {logs['train_runtime']:.1f} s")
        elif runtime := next((name for name in logs if name.endswith("_runtime")), None):
            prefix = runtime.removesuffix("runtime")
            _write(f"{step}, {prefix.removesuffix('_')}: {_numbers(logs, prefix)}")
        else:
            shown = {name: value for name, value in logs.items() if not is_known(name)}
            _write(f"{step}: {', '.join(f'{name} {_format(value)}' for name, value in shown.items())}")


def _is_table(trainer: Trainer) -> bool:
    return isinstance(trainer.train_dataset, Dataset)


def _count_saves(args, state) -> int:
    """Returns how many checkpoints there will be at most, of those that are saved at known steps."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy not in ("steps", "epoch"):
        return 0
    saves = -(-state.max_steps // state.save_steps) if strategy == "steps" else state.num_train_epochs
    return min(saves, args.save_total_limit or saves)


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:.3g} GB"


def _has_bars(args) -> bool:
    return sys.stderr.isatty() and not args.disable_tqdm


def _numbers(logs: dict[str, Any], prefix: str = "", short: bool = False) -> str:
    shown = {words[short]: logs[prefix + name] for name, words in _SHOWN.items() if prefix + name in logs}
    added = {name: value for name, value in logs.items() if not is_known(name)}
    return ", ".join(f"{name} {_format(value)}" for name, value in (shown | added).items())


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()
