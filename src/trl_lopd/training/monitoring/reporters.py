"""Logging to wandb, in addition to the scalars that transformers sends to every reporter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers.integrations
from datasets import Dataset
from transformers import Trainer

WORST_ROWS = 16


class WandbCallback(transformers.integrations.WandbCallback):
    """
    Callback that replaces the wandb callback of transformers in an [`OfflineOPDTrainer`]. It also adds the record of
    the training, as in the model card, to the run's config; logs EffOPD's searches as `effopd/...` instead of
    `train/effopd/...`; and, when training ends, logs the held-out rows with the largest reverse KL divergence as a
    table.

    Args:
        trainer ([`OfflineOPDTrainer`]): The trainer.
    """

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer

    def setup(self, args, state, model, **kwargs):
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            values = {"loss_type": self.trainer.loss_type, "offline_opd": self.trainer.describe_round()}
            self._wandb.config.update(values, allow_val_change=True)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        searches = {name: value for name, value in logs.items() if name.startswith("effopd/")}
        others = {name: value for name, value in logs.items() if name not in searches}
        super().on_log(args, state, control, model=model, logs=others, **kwargs)
        if searches and state.is_world_process_zero:
            self._wandb.log({**searches, "train/global_step": state.global_step})

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        super().on_train_end(args, state, control, model=model, processing_class=processing_class, **kwargs)
        held_out = self.trainer.eval_dataset
        for name, rows in (held_out if isinstance(held_out, Mapping) else {"": held_out}).items():
            if isinstance(rows, Dataset) and "teacher_topk_ids" in rows.column_names:
                # All processes evaluate, because sharded models need all of them.
                table = self._worst(rows)
                if state.is_world_process_zero:
                    prefix = f"eval/{name}_" if name else "eval/"
                    self._wandb.log({f"{prefix}worst_rows": table, "train/global_step": state.global_step})

    def _worst(self, rows: Dataset) -> Any:
        values = self.trainer.reverse_kl_of_rows(rows)
        decode = self.trainer.processing_class.decode
        table = self._wandb.Table(["row", "reverse_kl_topk", "prompt", "completion"])
        for row in (-values).argsort(kind="stable")[:WORST_ROWS].tolist():
            texts = (decode(rows[row][column]) for column in ("prompt_ids", "completion_ids"))
            table.add_data(row, float(values[row]), *texts)
        return table


def log_report(path: str | Path, run: Mapping[str, str] | None) -> str:
    """
    Logs a report as an artifact to the wandb run of the training, or to a new run if that is not known.

    Args:
        path (`str` or `Path`): The HTML file.
        run (`dict`, *optional*): `entity`, `project` and `id` of the training's wandb run.

    Returns:
        `str`: The artifact's name.

    Raises:
        ImportError: If wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise ImportError("`--report_to wandb` needs wandb: `pip install trl-lopd[wandb]`.") from None
    kwargs = {**run, "resume": "allow"} if run else {"project": os.getenv("WANDB_PROJECT", "huggingface")}
    with wandb.init(**kwargs) as active:
        artifact = wandb.Artifact(f"report-{active.id}", type="report")
        artifact.add_file(str(path), name="report.html")
        active.log_artifact(artifact)
    return artifact.name
