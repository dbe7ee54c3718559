"""Console output of a run: a few metrics. Reporters and `log_history` get every metric."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
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
    that [`OfflineOPDTrainer`] does not log, such as those of other callbacks, are shown too.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if _has_bars(args):
            super().on_train_begin(args, state, control, **kwargs)

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
