"""Writes the SFT teachers into the student's card while a trainer, TRL's or another, makes the student."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id

from ..table.schema import batches, teacher_counts
from .cards import Signature, count_teachers, read_model_card, record_of, signatures, stamp_model_card
from .consistency import inherited_teachers
from .fingerprint import (
    TeacherFingerprint,
    content_id,
    evidence_of,
    fingerprint_loaded,
    fingerprint_teacher,
    is_id,
    tokenizer_digest,
    tokenizer_part,
    with_evidence,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

logger = logging.getLogger(__name__)

COLUMN = "teacher_fingerprint"
# Rows of a teacher in which what is learnt is compared to what it sampled, and how much of each if rows are packed.
_COMPARED_ROWS = 500
_COMPARED_TOKENS = 200
# Tokens of a run that unrelated texts hardly share.
_RUN = 8


class TeacherStampCallback(TrainerCallback):
    """
    Stamps every checkpoint that a trainer saves or pushes with the teachers that wrote its data.

    They are read from the `teacher_fingerprint` column of the data, which [`generate_sft_data`] writes; what the
    model's own card says of earlier SFT data is kept, and the shares are those of all of it. Where rows have a
    `teacher_id`, their domain, the card says how many of each a teacher wrote. Only the main process writes. A teacher
    counts as verified if the tokens that are trained on are those that it sampled, and else as declared, with a
    warning that says why.

    ```python
    trainer = SFTTrainer(model, args, train_dataset=data)
    trainer.add_callback(TeacherStampCallback(trainer, data))
    trainer.train()
    trainer.push_to_hub()
    ```

    Args:
        trainer ([`~transformers.Trainer`]):
            TRL's `SFTTrainer`, or any other. Its `save_model` and `create_model_card` are wrapped: no event of a
            callback comes between the writing of a card and its upload.
        dataset ([`~datasets.Dataset`], *optional*):
            The training data as it was before the trainer prepared it: packing drops the column. Defaults to
            `trainer.train_dataset`, whose rows decide where they still have the column.
        parent (`str` or `Path`, *optional*):
            Directory or Hub id of what the training starts from, whose card says what it learnt before. Defaults to
            where the model was loaded from; give it for an adapter that is trained on.

    Raises:
        `TypeError`: if the data is a stream: its rows cannot be counted beforehand.
        `ValueError`: if it has no `teacher_fingerprint` column, if a value in it is no fingerprint, if no row names a
            teacher, or if the trainer trains on another number of rows, here or when training begins; when training
            begins, if it resumes a checkpoint that was trained on data of other teachers.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset | None = None, parent: str | Path | None = None):
        self._trainer, self._given = trainer, dataset
        # What a loaded model learnt before is said by the card of the checkpoint that it still is.
        start, parent = parent or trainer.model, parent or get_config_model_id(trainer.model.config)
        before = read_model_card(parent) if parent else {}
        earlier = []
        if before.get("sft_teachers"):
            consequence = f"{parent} cannot be fingerprinted, so what its card says counts as declared"
            own = fingerprint_or_none(start, consequence)
            earlier = inherited_teachers(before, own and own.id)
        self._earlier, self._earlier_rows = earlier, before.get("sft_rows", 0)
        self.opd_rounds = before.get("opd_rounds") or []
        self._has_trained = False
        self._count()

        self._fingerprints: dict[str, tuple[int, TeacherFingerprint | None]] = {}
        trainer.save_model = self._stamping_save(trainer, trainer.save_model)
        trainer.create_model_card = self._stamping_card(trainer, trainer.create_model_card)

    def _count(self) -> None:
        """Counts the rows of each teacher and domain."""
        trained = self._trained = self._trainer.train_dataset
        given = trained if self._given is None else self._given
        counts = _teachers_of(given)
        if given is not trained:
            counts = _of_those_trained_on(counts, trained, self._trainer.args)
        counts = _declared(counts, given, self._trainer)
        _warn_of_an_ignored_mask(trained, self._trainer.args)
        counts.update(signatures(self._earlier))
        counts[None, None] += max(self._earlier_rows - sum(entry.get("rows", 0) for entry in self._earlier), 0)
        self.sft_rows = sum(counts.values())
        self.sft_teachers = count_teachers(counts, [*record_of(given).get("sft_teachers", ()), *self._earlier])
        if unnamed := sum(rows for (teacher, _), rows in counts.items() if not teacher):
            logger.warning(
                f"{unnamed} of {self.sft_rows} SFT rows do not name a teacher. The card will give the others their "
                "share of all rows."
            )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self._trainer.train_dataset is not self._trained:
            if self._has_trained:
                raise ValueError(
                    "`train_dataset` was replaced after training, and the stamp can only tell of one. Save the model, "
                    "and make a trainer of it."
                )
            self._count()
        checkpoint = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.global_step and os.path.isdir(checkpoint):  # resumed
            before, now = (
                {(content_id(t["id"]) or t["id"], *sorted(t.get("teacher_ids") or ())): _named(t) for t in teachers}
                for teachers in (read_model_card(checkpoint).get("sft_teachers") or [], self.sft_teachers)
            )
            if before.keys() != now.keys():
                raise ValueError(
                    f"{checkpoint} was trained on data of {', '.join(sorted(before.values())) or 'nobody'}, with what "
                    f"its start had learnt from, and this run's is of {', '.join(sorted(now.values()))}. Resume it "
                    "with its own data and the model that it began with, or train on from it as a model."
                )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._has_trained = True

    def _stamping_save(self, trainer: Trainer, save_model):
        @functools.wraps(save_model)
        def save_and_stamp(output_dir: str | None = None, _internal_call: bool = False) -> None:
            save_model(output_dir, _internal_call)
            if trainer.is_world_process_zero():
                output_dir = output_dir or trainer.args.output_dir
                fingerprint = checkpoint_fingerprint(output_dir)
                self._fingerprints[output_dir] = (trainer.state.global_step, fingerprint)
                self._stamp(output_dir, fingerprint)

        return save_and_stamp

    def _stamping_card(self, trainer: Trainer, create_model_card):
        @functools.wraps(create_model_card)
        def create_and_stamp(*args, **kwargs) -> None:
            create_model_card(*args, **kwargs)
            if trainer.is_world_process_zero():
                # The weights beside the card may be an earlier checkpoint's: then it is not bound to them.
                step, fingerprint = self._fingerprints.get(trainer.args.output_dir, (None, None))
                current = step == trainer.state.global_step
                self._stamp(trainer.args.output_dir, fingerprint if current else None)

        return create_and_stamp

    def on_push_begin(self, args, state, control, **kwargs) -> None:
        # The weights pushed while training are those of the checkpoint just saved.
        checkpoint = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.is_world_process_zero and checkpoint in self._fingerprints:
            self._stamp(args.output_dir, self._fingerprints[checkpoint][1])

    def _stamp(self, directory: str, fingerprint: TeacherFingerprint | None) -> None:
        stamp_model_card(
            directory,
            sft_teachers=self.sft_teachers,
            sft_rows=self.sft_rows,
            checkpoint=fingerprint,
            opd_rounds=self.opd_rounds or None,
        )


def _named(entry: dict[str, Any]) -> str:
    domains = ", ".join(entry.get("teacher_ids") or ())
    return f"{entry['id']} ({domains})" if domains else entry["id"]


def _declared(counts: Counter[Signature], given: Dataset, trainer: Trainer) -> Counter[Signature]:
    """The rows of each teacher and domain; a teacher is declared where nothing shows that what it sampled is what is
    trained on."""
    reasons = {
        teacher: _why_declared(teacher, given, trainer)
        for teacher in dict.fromkeys(teacher for teacher, _ in counts)
        if teacher and evidence_of(teacher) != "declared"
    }
    if reasons := {teacher: reason for teacher, reason in reasons.items() if reason}:
        logger.warning(
            "The card only declares these teachers, because nothing shows that what they sampled is what is trained "
            f"on: {'; '.join(f'{teacher}, because {reason}' for teacher, reason in reasons.items())}."
        )
    result: Counter[Signature] = Counter()
    for (teacher, domain), rows in counts.items():
        result[with_evidence(teacher, "declared") if teacher in reasons else teacher, domain] += rows
    return result


def _why_declared(teacher: str, given: Dataset, trainer: Trainer) -> str | None:
    """
    Says why nothing shows that what a teacher sampled is what is trained on; `None` if that is shown.

    Token ids are compared, whatever the tokenizers are: where they are the same, it is what was sampled. A chat
    template may drop a part of an answer, and texts may have been changed since.

    Args:
        teacher (`str`): Its id in the column `teacher_fingerprint`.
        given (`Dataset`): What [`generate_sft_data`] made.
        trainer ([`~transformers.Trainer`]): Its `train_dataset` is what it made of `given`.
    """
    trained, args = trainer.train_dataset, trainer.args
    columns = trained.column_names if isinstance(trained, Dataset) else ()
    source = trained if {COLUMN, "completion_ids"} <= {*columns} else given
    if "completion_ids" not in source.column_names:
        return "the data has no column `completion_ids`, the tokens that it sampled, which `generate_sft_data` writes"
    if "input_ids" not in columns:
        return "the trainer's `train_dataset` has no column `input_ids`, the tokens that are trained on"
    rows = np.flatnonzero([value == teacher for value in source[COLUMN]])
    if not len(rows):
        return "no row of the data given names it"
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _COMPARED_ROWS)).astype(int)]
    keeps_rows = source is trained or not (getattr(args, "packing", False) or getattr(args, "shuffle_dataset", False))
    if keeps_rows and len(trained) == len(source):
        share = _share_of_learnt(source.select(rows), trained.select(rows))
        what = f"{share:.0%} of what is trained on was sampled"
    else:
        share = _share_of_sampled(source.select(rows), trained)
        what = f"{share:.0%} of what was sampled is found in what is trained on, whose rows were packed or shuffled"
    if share >= 0.5:
        return None
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    is_other = tokenizer is None or tokenizer_part(teacher) != tokenizer_digest(tokenizer)[:8]
    other = " (it has another tokenizer, and the same text may have other ids)" if is_other else ""
    return f"only {what}, as token ids{other}"


def _warn_of_an_ignored_mask(trained, args: TrainingArguments) -> None:
    """
    Warns if labels learn what `completion_mask` leaves out. Unless it is told, `SFTTrainer` uses the mask only where
    rows have `prompt` and `completion`. Packed rows have no mask any more to look at.
    """
    columns = trained.column_names if isinstance(trained, Dataset) else ()
    if getattr(args, "completion_only_loss", False) is not None or not {"labels", "completion_mask"} <= {*columns}:
        return
    rows = np.linspace(0, len(trained) - 1, min(len(trained), _COMPARED_ROWS)).astype(int)
    for row in trained.select(rows).select_columns(["labels", "completion_mask"]):
        # Only the labels are cut at `max_length`.
        labels, mask = row["labels"], row["completion_mask"] or ()
        mask = mask[-len(labels) :] if args.truncation_mode == "keep_end" else mask
        if any(label != -100 and not is_learnt for label, is_learnt in zip(labels, mask, strict=False)):
            logger.warning(
                "What `completion_mask` leaves out, such as the prompts, is trained on, too: `SFTTrainer` uses it "
                "only where rows have `prompt` and `completion`, or with `SFTConfig(completion_only_loss=True)`. If "
                "that is meant, set it to False."
            )
            return


def _share_of_learnt(sampled: Dataset, trained: Dataset) -> float:
    """
    The share of what is learnt that was sampled, in the same rows. Warns if much that was sampled is not learnt.

    Pairs of neighbouring tokens are counted, so that what a template adds to an answer, or where it is cut, makes
    little difference. The first token makes a pair with the beginning, so that answers of one token count.
    """
    written, learnt, both = Counter(), Counter(), Counter()
    for before, after in zip(sampled, trained, strict=True):
        ids, prompt = after["input_ids"], before.get("prompt_ids") or []
        # Labels decide where there are any: `SFTTrainer` removes a mask that they follow, and ignores one that stays.
        if after.get("labels") is not None:
            mask = [label != -100 for label in after["labels"]]
        else:
            mask = after.get("completion_mask") or after.get("assistant_masks")
        if mask is not None:
            ids = [id for id, is_learnt in zip(ids, mask, strict=True) if is_learnt]
        if (mask is None or all(mask[: len(prompt)])) and ids[: len(prompt)] == prompt:
            ids = ids[len(prompt) :]
        pairs = [Counter(zip((None, *tokens), tokens, strict=False)) for tokens in (before["completion_ids"], ids)]
        for total, count in zip((written, learnt, both), (*pairs, pairs[0] & pairs[1]), strict=True):
            total.update(count)
    of_written = both.total() / max(written.total(), 1)
    of_learnt = both.total() / max(learnt.total(), 1)
    if of_written < 0.9:
        logger.warning(
            f"Only {of_written:.0%} of what the teacher sampled is trained on, in {len(sampled)} rows: a chat "
            "template drops a part of the answers (such as their reasoning), `max_length` cuts them, or their texts "
            "were changed. `generate_sft_data(..., truncated='keep')` also writes `input_ids`, which `SFTTrainer` "
            "takes as they are; filter by `finish_reason` to leave out those that were cut."
        )
    return of_learnt


def _share_of_sampled(sampled: Dataset, trained: Dataset) -> float:
    """The share of what was sampled that is somewhere in what is trained on: of runs of 8 tokens, or as many as a
    short answer has with its prompt."""
    hashes: dict[int, list[np.ndarray]] = {}
    for row in sampled:
        # Trainers end an answer in ways of their own; and a part of a long one is enough.
        answer, prompt = row["completion_ids"], row.get("prompt_ids") or []
        answer = (answer[:-1] or answer)[:_COMPARED_TOKENS]
        ids = [*prompt[max(len(prompt) + len(answer) - _RUN, 0) :], *answer] if len(answer) < _RUN else answer
        if answer:
            length = min(len(ids), _RUN)
            hashes.setdefault(length, []).append(_run_hashes(np.array(ids), length))
    found = total = 0
    for length, parts in hashes.items():
        wanted = np.unique(np.concatenate(parts))
        is_found = np.zeros(len(wanted), bool)
        for batch in batches(trained, ["input_ids"], 100):
            tokens = batch["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            there = _run_hashes(tokens, length)
            places = np.minimum(np.searchsorted(wanted, there), len(wanted) - 1)
            is_found[places[wanted[places] == there]] = True
        found, total = found + int(is_found.sum()), total + len(wanted)
    return found / max(total, 1)


def _run_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the runs of `length` neighbouring tokens: `(tokens - length + 1,)` uint64."""
    if len(tokens) < length:
        return np.empty(0, np.uint64)
    factors = np.random.default_rng(0).integers(2**64, size=_RUN, dtype=np.uint64)[:length]
    return np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), length) @ (factors | np.uint64(1))


def _teachers_of(dataset: Dataset) -> Counter[Signature]:
    """Rows of each teacher and domain."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The teachers of a `{type(dataset).__name__}` cannot be counted. Give the rows as a `Dataset`, or "
            "stamp the result: `stamp_model_card(directory, sft_teachers=[...])`."
        )
    if COLUMN not in dataset.column_names:
        raise ValueError(
            f"The training data has no `{COLUMN}` column, only {dataset.column_names}: nothing says who wrote it. "
            "`generate_sft_data` writes the column; if the trainer dropped it, give the data as it was: "
            "`TeacherStampCallback(trainer, dataset)`."
        )
    counts = teacher_counts(dataset)
    if unknown := [teacher for teacher, _ in counts if teacher and not is_id(teacher)]:
        raise ValueError(
            f"The training data has {unknown[0]!r} in its `{COLUMN}` column, which is no fingerprint. "
            "`fingerprint_teacher(teacher).id` is; leave the column empty for rows that no teacher wrote."
        )
    if not any(teacher for teacher, _ in counts):
        raise ValueError(f"No row of the training data names its teacher: the column `{COLUMN}` is empty.")
    return counts


def _of_those_trained_on(given: Counter[Signature], trained: Any, args: TrainingArguments) -> Counter[Signature]:
    """The counts of the data given, if that may be what is trained on, or what the rows trained on say themselves."""
    columns = trained.column_names if isinstance(trained, Dataset) else ()
    if COLUMN in columns:
        counts = _teachers_of(trained)
        if counts != given:
            logger.warning(
                f"The teachers of the {counts.total()} rows that are trained on are not those of the data given to "
                f"`TeacherStampCallback`, {given.total()} rows: the card gets those of the rows trained on."
            )
        return counts
    if "seq_lengths" in columns:  # packed by TRL, which keeps the bounds of rows
        rows = sum(map(len, trained["seq_lengths"]))
    else:
        rows = len(trained) if hasattr(trained, "__len__") else None
    # Rows are put together, or cut into several.
    packed = getattr(args, "packing", False) and getattr(args, "packing_strategy", "") != "bfd"
    if rows is None or packed:
        logger.warning(
            f"The rows that are trained on cannot be compared with those given to `TeacherStampCallback`: the card "
            f"will say that the model was trained on the latter, {given.total()} rows."
        )
    elif rows != given.total():
        raise ValueError(
            f"The trainer trains on {rows} rows, and the data given to `TeacherStampCallback` has {given.total()}: "
            "give it the data that the trainer was made with. Where the trainer leaves out rows, let it have the "
            f"`{COLUMN}` column, too: it then says which are left."
        )
    return given


def checkpoint_fingerprint(directory: str) -> TeacherFingerprint | None:
    """Fingerprint of a checkpoint just saved; `None`, with a word in the log, if it does not hold whole weights."""
    # ZeRO-3 may save shards of the optimizer's state only, for instance; the teachers are recorded all the same.
    return fingerprint_or_none(directory, f"The card of {directory} is not bound to its weights", logging.INFO)


def fingerprint_or_none(
    model: str | Path | PreTrainedModel, consequence: str, level: int = logging.WARNING, **kwargs: Any
) -> TeacherFingerprint | None:
    """
    `fingerprint_teacher(model, **kwargs)`, or of a loaded model `fingerprint_loaded`; `None` for what has no
    fingerprint or is out of reach.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]): Local directory, Hub id or loaded model.
        consequence (`str`): What follows if there is none; logged with the reason.
        level (`int`, *optional*): At which level.
    """
    fingerprint = fingerprint_teacher if isinstance(model, str | Path) else fingerprint_loaded
    try:
        return fingerprint(model, **kwargs)
    except (OSError, ValueError) as error:
        logger.log(level, f"{consequence}: {error}")
        return None
