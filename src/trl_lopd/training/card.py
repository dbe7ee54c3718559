"""Files that a trainer writes beside a checkpoint: the card with the whole lineage, the arguments and row hashes."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.utils import generate_model_card, get_config_model_id

from ..identity.cards import count_teachers, read_model_card, record_of, stamp_model_card
from ..identity.fingerprint import TeacherFingerprint, content_id, weights_part
from ..identity.stamp import checkpoint_fingerprint
from ..table.schema import RESIDUAL, TRAINED_ROWS, column_counts, row_hashes, teacher_counts

logger = logging.getLogger(__name__)

_PAPER = {
    "title": "Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline On-Policy Distillation",
    "id": "2604.13010",
    "citation": """@misc{wu2026lightningopd,
    title         = {{Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline On-Policy Distillation}},
    author        = {Yecheng Wu and Song Han and Han Cai},
    year          = 2026,
    eprint        = {2604.13010},
    archivePrefix = {arXiv},
}""",  # noqa: E501
}


@dataclass(frozen=True)
class SavedCheckpoint:
    """
    The last weights that a trainer saved.

    Attributes:
        directory (`str`): Directory that they are in.
        step (`int`): Step after which they were saved.
        fingerprint ([`TeacherFingerprint`], *optional*): Their fingerprint; `None` if it cannot be computed.
    """

    directory: str
    step: int
    fingerprint: TeacherFingerprint | None


def fingerprint_saved(trainer: Trainer, directory: str) -> TeacherFingerprint | None:
    """Computes the fingerprint of weights that an [`OfflineOPDTrainer`] just saved; `None` if they have none.

    An adapter over another base than it was trained on is not what was trained, and gets none: its base was changed
    after it was loaded, or what its config names was.
    """
    fingerprint, student = checkpoint_fingerprint(directory), trainer.student
    if fingerprint is None or fingerprint.adapter is None or student.is_adapter:
        return fingerprint  # the id of a student that is an adapter already does not tell its base from the adapter
    if fingerprint.weights.startswith(weights_part(student.fingerprint or "")):
        return fingerprint
    logger.warning(
        f"The adapter in {directory} was not trained over the base that it names in `adapter_config.json`: loaded "
        f"from there, it is another model. Save the base that it was trained on, {student.fingerprint}, and name its "
        "directory as `base_model_name_or_path`. The card is not bound to the weights."
    )
    return None


def describe_round(trainer: Trainer) -> dict[str, Any]:
    """Describes the training of an [`OfflineOPDTrainer`] as an entry of `opd_rounds`, see [`~identity.cards`]."""
    student, check, mode = trainer.student, trainer.rows.trained, trainer.args.teacher_consistency
    if isinstance(trainer.train_dataset, Dataset):
        teachers, verdict = teacher_counts(trainer.train_dataset), check.verdict
        samplers = column_counts(trainer.train_dataset, "student_fingerprint")
    else:
        teachers, samplers = check.of_all
        verdict = (
            check.judge(teachers, "the stream", samplers, teacher_consistency="off") if teachers else check.verdict
        )
    record = {
        "student": student.fingerprint or Path(get_config_model_id(trainer.model.config)).name,
        "objective": trainer.loss_type,
        **({"beta": trainer.args.beta} if trainer.loss_type == "topk" else {}),
        **({"router_aux_loss_coef": coef} if (coef := trainer.objective.aux_loss_coef) else {}),
        **({"residual": fits} if (fits := _residual_of(trainer)) is not None else {}),
        "teacher_consistency": "off" if mode == "off" else verdict.evidence or f"overridden ({mode})",
        "rows": sum(teachers.values()),
        "teachers": count_teachers(teachers),
    }
    if sampled_by := count_teachers(samplers):
        record["sampled_by"] = sampled_by
    return record


def _residual_of(trainer: Trainer) -> list[dict[str, Any]] | None:
    """Returns what was subtracted from the scores of the training rows, as far as it is known; `None` if nothing."""
    table, check = trainer.train_dataset, trainer.rows.trained
    is_residual = RESIDUAL in table.column_names if isinstance(table, Dataset) else check.is_residual
    return record_of(table).get("residual", []) if is_residual else None


# Arguments that a resumed run may not change: those of the loss, beside what the card names; those that decide the
# rows of a step (however many processes share them); and those restored with the optimizer and the scheduler, where
# another value would be ignored.
_KEPT_ARGUMENTS = (
    *("beta", "advantage_clip", "ratio_clip", "loss_aggregation", "teacher_weights", "teacher_logprob_floor"),
    *("router_aux_loss_coef", "max_completion_length", "max_length"),
    *("seed", "data_seed", "train_sampling_strategy", "packing", "dataloader_drop_last", "total_train_batch_size"),
    *("learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim"),
)


def check_resumed(trainer: Trainer, checkpoint: str) -> int:
    """
    Compares a checkpoint with the run that goes on from it: the card of the result is about both.

    Returns:
        `int`: The step that it was saved after.

    Raises:
        ValueError: If the checkpoint is of another run: of another trainer, student, round, table or objective; or of
            a later pass over a stream than the first.
    """
    settings = Path(checkpoint, "training_args.json")
    if not settings.is_file():
        raise ValueError(f"{checkpoint} was not saved by `OfflineOPDTrainer`: it has no `training_args.json`.")
    earlier = len(trainer.student.card.get("opd_rounds") or [])
    rounds = read_model_card(checkpoint).get("opd_rounds") or []
    if rounds and len(rounds) != earlier + 1:
        raise ValueError(
            f"{checkpoint} is no checkpoint of this run: its card tells of {len(rounds)} rounds of offline OPD, and "
            f"that of the student, {trainer.student.name}, of {earlier} before this one. Give another `output_dir` to "
            "a new round, and resume a checkpoint with the student that its training began with."
        )
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    is_skipped = isinstance(trainer.train_dataset, IterableDataset) and not trainer.args.ignore_data_skip
    # `Trainer` counts a pass over a stream as one epoch, whatever its length.
    passes = math.ceil(state.epoch or 0)
    if is_skipped and passes > 1 and state.global_step < trainer.args.max_steps:
        raise ValueError(
            f"{checkpoint} was saved in pass {passes} over a stream, and a stream is only skipped within "
            "its first pass: other rows would follow. Train on a `Dataset`, or accept that the stream starts from its "
            "beginning: `ignore_data_skip=True`."
        )
    then, here = json.loads(settings.read_text()), json.loads(_settings(trainer))
    changed = [
        f"`{name}` was {then[name]} and is {here[name]}"
        for name in _KEPT_ARGUMENTS
        if name in then and then[name] != here[name]
    ]
    if here["train_sampling_strategy"] == "group_by_length":
        groups = [of["per_device_train_batch_size"] * of["gradient_accumulation_steps"] for of in (then, here)]
        if groups[0] != groups[1]:
            changed.append(f"its rows were sorted by length in groups of {groups[0]} rows a process, not {groups[1]}")
    scored_by = scored_by_now = {}
    if rounds:
        before, now = rounds[earlier], describe_round(trainer)
        for name in ("student", "objective", "residual"):
            # Names are for people: a copy of the student is the same student.
            if _content(before.get(name)) != _content(now.get(name)):
                changed.append(f"`{name}` was {before.get(name)} and is {now.get(name)}")
        # A stream's samplers are not known before it is read.
        added = sorted(before.keys() - now.keys() - {"sampled_by", "residual"})
        if added and not any(hasattr(callback, "card_record") for callback in trainer.callback_handler.callbacks):
            changed.append(f"a callback added `{', '.join(added)}` to its record, and this run has no such callback")
        scored_by, scored_by_now = (
            {_content(entry["id"]): str(entry["id"]) for entry in record.get("teachers") or []}
            for record in (before, now)
        )
    if isinstance(trainer.train_dataset, Dataset):
        hashes = Path(checkpoint, TRAINED_ROWS)
        if scored_by.keys() != scored_by_now.keys():
            names = [", ".join(sorted(ids.values())) for ids in (scored_by, scored_by_now)]
            changed.append(f"its rows were scored by {names[0]}, and these by {names[1]}")
        elif hashes.is_file():
            before, now = np.load(hashes), row_hashes(trainer.train_dataset)
            if not np.array_equal(np.unique(before), np.unique(now)):
                changed.append(f"it was trained on other rows than the {len(now)} of `train_dataset`")
            elif not np.array_equal(before, now):
                changed.append(f"`train_dataset` has the same rows, in another order or number: {len(now)} rows")
    if changed:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(changed)}. Resume it with the same, or train "
            "on from it in a new round: give it as `model`, with another `output_dir`."
        )
    return state.global_step


def _content(name: Any) -> str:
    """The content that an id names; a name that is no id stands for itself."""
    return content_id(str(name)) or str(name)


def write_card(
    trainer: Trainer, output_dir: str, *, model_name: str | None, dataset_name: str | None, tags: list[str]
) -> None:
    """Writes `README.md` into a directory; see [`OfflineOPDTrainer.create_model_card`].

    If a callback has a method `card_record`, its result is added to the record of the round.
    """
    base_model = get_config_model_id(trainer.model.config) or "an unnamed model"
    is_local = os.path.isdir(base_model)
    base_model = Path(base_model).name if is_local else base_model
    model_name = model_name or Path(trainer.args.hub_model_id or trainer.args.output_dir).name
    card = generate_model_card(
        base_model=base_model,
        model_name=model_name,
        hub_model_id=trainer.hub_model_id or model_name,
        dataset_name=dataset_name,
        tags=tags,
        wandb_url=(run := _wandb_run()) and run.url,
        trackio_url=None,
        trainer_name="Offline OPD",
        trainer_citation=_PAPER["citation"],
        paper_title=_PAPER["title"],
        paper_id=_PAPER["id"],
    )
    if is_local:
        # A directory is not a Hub id, so the card names it without a link and without `base_model` metadata.
        card.data.base_model = None
        card.text = card.text.replace(f"[{base_model}](https://huggingface.co/{base_model})", f"`{base_model}`")
    card.save(os.path.join(output_dir, "README.md"))

    student, saved, rounds = trainer.student, trainer.saved, []
    if trainer.rows.has_trained or trainer.state.global_step:  # a model that is saved untrained has no round
        rounds = [describe_round(trainer)]
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "card_record"):
                rounds[0] |= callback.card_record()
    # The fingerprint is only valid for this card if the weights in the directory are those of the current step.
    is_current = saved is not None and (saved.directory, saved.step) == (output_dir, trainer.state.global_step)
    stamp_model_card(
        output_dir,
        sft_teachers=student.sft_teachers,
        sft_rows=student.card.get("sft_rows"),
        checkpoint=saved.fingerprint if is_current else None,
        opd_rounds=[*(student.card.get("opd_rounds") or []), *rounds],
    )


def write_arguments(trainer: Trainer, output_dir: str) -> None:
    """Writes the training arguments as JSON and hashes of the training rows.

    The JSON file is for users and for `trl-lopd report`, because `training_args.bin` is a pickle. With the hashes, in
    the order of the rows, a report can show rows that the student was not trained on, and [`check_resumed`] sees
    whether a resumed run would read other rows.
    """
    if isinstance(trainer.train_dataset, Dataset):
        np.save(Path(output_dir, TRAINED_ROWS), row_hashes(trainer.train_dataset))
    else:  # of another run
        Path(output_dir, TRAINED_ROWS).unlink(missing_ok=True)
    Path(output_dir, "training_args.json").write_text(_settings(trainer))


def _settings(trainer: Trainer) -> str:
    settings = trainer.args.to_dict()
    settings["router_aux_loss_coef"] = trainer.objective.aux_loss_coef  # also where the model's config decides it
    settings["total_train_batch_size"] = trainer.get_total_train_batch_size(trainer.args)
    if trainer.args.accelerator_config.split_batches:  # each process gets a part of every batch
        settings["total_train_batch_size"] //= trainer.accelerator.num_processes
    if (run := _wandb_run()) is not None:
        settings["wandb_run"] = {"entity": run.entity, "project": run.project, "id": run.id}
    return json.dumps(settings, indent=2, default=str)


def _wandb_run() -> Any:
    """Returns the active wandb run, if there is one."""
    wandb = sys.modules.get("wandb")
    return wandb and wandb.run
