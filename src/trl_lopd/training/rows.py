"""Rows for training and evaluation: validation against the student, and the teachers and students that made them.

A whole table is validated before the student is loaded. For a stream, only the first row is validated then, and each
other row when it is read. The process that trains on the rows of a stream counts their teachers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..errors import TableError
from ..identity.cards import Signature, read_model_card, signatures
from ..identity.consistency import Verdict, check_teacher_consistency
from ..models import check_positions, stretches_from
from ..processes import on_main_process
from ..table.schema import (
    LEAST_SPREAD,
    REQUIRED_COLUMNS,
    RESIDUAL,
    TEACHER_ID,
    TOKEN_COLUMNS,
    TableSummary,
    batches,
    column_counts,
    flat_values,
    lengths,
    numpy_rows,
    prompt_and_row_hashes,
    refuse_no_dataset,
    validate_rows,
    validate_table,
)
from .collator import FILLER, OfflineOPDCollator, Row, completion_room, no_weight, padded_length, too_long
from .packing import best_fit_decreasing

# Passes over a table beyond which it warns: 13 were measured to pay and 38 not to, by `benchmarks/evidence.py`.
_MOST_PASSES = 20

if TYPE_CHECKING:
    from transformers import Trainer

    from .config import OfflineOPDConfig
    from .student import Student

logger = logging.getLogger(__name__)


class TrainingRows:
    """
    Tables and streams of a trainer.

    Args:
        student ([`Student`]): The student that learns from them.
        args ([`OfflineOPDConfig`]): Limits of rows, the objective, and how strictly teachers are checked.

    Attributes:
        loss_type (`str`, *optional*): The objective, determined by the columns of the training rows.
        trained, evaluated ([`TeacherCheck`]): Teachers of the training and of the evaluation rows. They are separate,
            because the card only names the teachers that trained the model.
        measures_off_policy (`bool`): Whether other weights than the student's sampled the training rows, and
            `ref_logprobs` allow measuring how far the student is from them.
        has_trained (`bool`): Whether rows have trained the model.
        row_lengths (`(rows,)` int, *optional*): Tokens of each row of the training table after truncation.
        packs (`list` of int arrays, *optional*): With `args.packing`, the indices of the rows in each pack.
    """

    def __init__(self, student: Student, args: OfflineOPDConfig):
        self.student, self.args = student, args
        self.trained, self.evaluated = TeacherCheck(student, args), TeacherCheck(student, args)
        self.loss_type: str | None = None
        self.measures_off_policy = False
        self.has_trained = False
        self.row_lengths: np.ndarray | None = None
        self.packs: list[np.ndarray] | None = None
        self._has_cut_a_pass = False
        self._training_rows: Dataset | IterableDataset | None = None
        # Prepared datasets; for streams, with the check of their rows.
        self._prepared: WeakKeyDictionary[Dataset | IterableDataset, RowCheck | None] = WeakKeyDictionary()

    def prepare(self, dataset: Dataset | IterableDataset, name: str, training: bool = False) -> set[str]:
        """
        Validates all rows of a `Dataset`, or the first row of a stream, against the student and the objective.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The rows.
            name (`str`): Name of the dataset in messages.
            training (`bool`, *optional*, defaults to `False`): Whether they are training rows.

        Returns:
            `set[str]`: Their columns.

        Raises:
            TableError: If a row is not valid or the stream is empty.
            TeacherConsistencyError: Depending on `args.teacher_consistency`.
            TypeError: If `dataset` is neither a `Dataset` nor an `IterableDataset`.
        """
        check = self.trained if training else self.evaluated
        if isinstance(dataset, IterableDataset):
            columns = self._prepare_stream(dataset, name, check)
        else:
            columns = self._prepare_table(dataset, name, check)
        if training:
            self._training_rows = dataset
        elif isinstance(dataset, Dataset) and isinstance(self._training_rows, Dataset):
            prompts, trained = (prompt_and_row_hashes(rows)[0] for rows in (dataset, self._training_rows))
            if shared := int(np.isin(prompts, trained).sum()):
                logger.warning(
                    f"`{name}`: {shared} of {len(dataset)} rows answer prompts that are trained on, so their metrics "
                    "look better than those of new prompts. Hold out whole prompts."
                )
        if training and check.verdict is not None and check.verdict.off_policy:
            self.measures_off_policy = "ref_logprobs" in columns
            if not self.measures_off_policy:
                logger.warning(
                    "Without a `ref_logprobs` column nothing can measure how far off-policy the rollouts are. "
                    "`score_rollouts(..., ref_model=...)` writes it."
                )
        return columns

    def use_for_training(self, dataset: Dataset | IterableDataset) -> None:
        """
        Prepares training rows that replace others.

        Raises:
            ValueError: If the others have trained the model, whose card can only tell of one table.
        """
        if dataset is self._training_rows:
            return
        if self.has_trained:
            raise ValueError(
                "`train_dataset` was replaced after training, and the card of the model can only tell of one table. "
                "Save the model, and make a trainer of it for the next round."
            )
        self.prepare(dataset, "train_dataset", training=True)

    def cut_pass(self, batches: int, per_step: int) -> None:
        """Warns, once, that the batches at the end of a stream are too few for a step."""
        if not self._has_cut_a_pass:
            logger.warning(
                f"The stream ended {batches} of {per_step} batches into a step of `gradient_accumulation_steps`: each "
                "pass over it ends with its last whole step."
            )
        self._has_cut_a_pass = True

    def collator(self) -> OfflineOPDCollator:
        """Returns the collator that makes batches of the rows."""
        args = self.args
        return OfflineOPDCollator(
            pad_token_id=self.student.pad_token_id,
            max_completion_length=args.max_completion_length,
            max_length=args.max_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
            teacher_logprob_floor=args.teacher_logprob_floor,
            padding_free=args.padding_free,
            positions=self.student.positions,
            max_tokens=args.max_tokens_per_device,
            teacher_weights=args.teacher_weights,
        )

    def is_prepared(self, dataset: Any) -> bool:
        """Returns whether [`prepare`] was called with a dataset."""
        return isinstance(dataset, Dataset | IterableDataset) and dataset in self._prepared

    def check_of(self, stream: IterableDataset) -> RowCheck:
        """Returns a new check for the rows of a prepared stream, with a row count of 0."""
        return replace(self._prepared[stream])

    def _prepare_stream(self, stream: IterableDataset, name: str, check: TeacherCheck) -> set[str]:
        first = next(iter(in_arrow(stream)), None)
        if first is None:
            raise TableError(f"`{name}` is an empty stream.")
        columns = columns_of(first)

        def judge() -> tuple[RowCheck, Verdict, str]:
            rows = RowCheck(self.args.teacher_logprob_floor, self.student.vocab_limits, columns)
            (row,) = rows([first])
            check.is_residual = RESIDUAL in columns
            teachers = [(row["teacher_fingerprint"], _domain_of(row.get(TEACHER_ID)))]
            verdict = check.judge(teachers, "the stream", sampled_by=[row.get("student_fingerprint")])
            return replace(rows, rows=0), verdict, row["teacher_fingerprint"]

        self._prepared[stream], check.verdict, check.first = on_main_process(self.args.distributed_state, judge)
        self.loss_type = resolve_loss_type(self.args, columns, self.loss_type)
        return columns

    def _prepare_table(self, table: Dataset, name: str, check: TeacherCheck) -> set[str]:
        args, student = self.args, self.student
        refuse_no_dataset(table, name)
        try:
            summary = validate_table(
                table, student.tokenizer, student.config, teacher_logprob_floor=args.teacher_logprob_floor
            )
        except TableError as error:
            raise TableError(f"`{name}`: {error}") from None
        if args.teacher_consistency != "off":
            check.verdict = on_main_process(args.distributed_state, lambda: check.judge(table, name))
        columns = set(table.column_names)
        self.loss_type = resolve_loss_type(args, columns, self.loss_type)
        if check is self.trained and args.teacher_weights:
            _check_weights(table, args.teacher_weights, name)
        self._report(summary, name)
        row_lengths = _fitting_lengths(table, args, name)
        if check is self.trained:
            self.row_lengths = row_lengths
            if args.packing:
                self.packs = best_fit_decreasing(row_lengths, args.max_length)
                logger.info(
                    f"{len(table)} rows in {len(self.packs)} packs of at most {args.max_length} tokens, which are "
                    f"{row_lengths.sum() / (len(self.packs) * args.max_length):.1%} full."
                )
            _advise(table, self.loss_type, args, len(self.packs if args.packing else table))
        model = "the student (`max_length` truncates completions)"
        _report_stretched(row_lengths, stretches_from(student.config), name)
        check_positions(row_lengths, student.positions, model, f"`{name}`: row")
        if check is self.trained and args.max_tokens_per_device is not None:
            row = int(row_lengths.argmax())
            width = padded_length(int(row_lengths[row]), args.pad_to_multiple_of)
            if width > args.max_tokens_per_device:
                raise TableError(f"`{name}`, row {row}: {too_long(width, args.max_tokens_per_device)}")
        self._prepared[table] = None
        return columns

    def _report(self, summary: TableSummary, name: str) -> None:
        if summary.floored:
            logger.warning(
                f"`{name}`: {summary.floored} teacher log-probabilities are -inf and will be replaced by "
                f"{self.args.teacher_logprob_floor}."
            )
        if summary.foreign_topk:
            logger.warning(
                f"`{name}`: {summary.foreign_topk} of the teacher's top-k tokens are not in the student's vocabulary. "
                "Their probability is added to that of all other tokens."
            )


class TeacherCheck:
    """
    Check of teacher consistency, with counts of the teachers that scored the rows and the students that sampled them.

    Args:
        student ([`Student`]): The student that learns.
        args ([`OfflineOPDConfig`]): Arguments with `teacher_consistency`.

    Attributes:
        verdict ([`Verdict`], *optional*): Verdict on the rows so far; `None` if nothing was checked.
        is_residual (`bool`): Whether the rows of a stream have residual scores, see [`residualize_table`].
        first (`str`, *optional*): Teacher of the first row of a stream.
        domains, samplers (`Counter`): Number of rows of a stream of each pair of a teacher and a `teacher_id`, and of
            each student. Only the rows that this process has trained on are counted.
    """

    def __init__(self, student: Student, args: OfflineOPDConfig):
        self.student, self.teacher_consistency = student, args.teacher_consistency
        self.verdict: Verdict | None = None
        self.is_residual = False
        self.first: str | None = None
        self.domains: Counter[tuple[str, str | None]] = Counter()
        self.samplers: Counter[str | None] = Counter()
        self._of_all: tuple[Counter[tuple[str, str | None]], Counter[str | None]] | None = None

    def judge(
        self,
        table: Dataset | Iterable[Signature],
        name: str,
        sampled_by: Iterable[str] = (),
        teacher_consistency: str | None = None,
    ) -> Verdict:
        """Applies the consistency check to a table, or to the teachers and students of some rows."""
        return check_teacher_consistency(
            self.student.card,
            table,
            sampled_by=sampled_by,
            is_residual=self.is_residual,
            student_fingerprint=self.student.fingerprint,
            teacher_consistency=teacher_consistency or self.teacher_consistency,
            student=self.student.name,
            table_name=name,
            processing_class=self.student.tokenizer,
        )

    def meet(self, batch: dict[str, Any]) -> list[str | None] | None:
        """Checks and counts the rows of a stream's batch, removes their fingerprints from the batch, and returns the
        `teacher_id` of each; `None` for a batch of a table."""
        names = ("teacher_fingerprint", TEACHER_ID, "student_fingerprint")
        teachers, ids, samplers = (batch.pop(name, None) for name in names)
        if teachers is None:
            return None
        pairs = [(teacher, _domain_of(id)) for teacher, id in zip(teachers, ids, strict=True)]
        if not ({*pairs} <= self.domains.keys() and {*samplers} <= self.samplers.keys()):
            all_pairs = sorted({*self.domains, *pairs}, key=lambda pair: (pair[0], pair[1] or ""))
            self.verdict = self.judge(all_pairs, "the stream", sampled_by={*self.samplers, *samplers})
        self.domains.update(pairs)
        self.samplers.update(samplers)
        return [domain for _, domain in pairs]

    def resume(self, checkpoint: str) -> None:
        """Restores the counts of the rows that trained a checkpoint from its card, without those of earlier rounds."""
        self.domains, self.samplers = Counter(), Counter()
        if not PartialState().is_main_process:
            return  # the counts of all processes are summed, so only one process restores them
        earlier = len(self.student.card.get("opd_rounds") or [])
        rounds = read_model_card(checkpoint).get("opd_rounds") or []
        if len(rounds) <= earlier or "rows" not in rounds[earlier]:
            logger.warning(
                f"{checkpoint} has no card that says which rows of the stream trained it: the card of this run will "
                "only count the rows of the following steps."
            )
            return
        self.domains = signatures(rounds[earlier].get("teachers") or [])
        for (name, _), count in signatures(rounds[earlier].get("sampled_by") or []).items():
            self.samplers[name] += count
        self.samplers[None] += self.domains.total() - self.samplers.total()

    @property
    def of_all(self) -> tuple[Counter[tuple[str, str | None]], Counter[str | None]]:
        """Returns the rows of a stream of each teacher and domain, and of each student; of all processes after a call
        of [`gather`]."""
        return self._of_all or (self.domains, self.samplers)

    def gather(self) -> None:
        """Adds up the counts of all processes. All of them must call this."""
        if PartialState().num_processes > 1:
            parts = gather_object([(self.domains, self.samplers)])
            self._of_all = tuple(sum(counts, Counter()) for counts in zip(*parts, strict=True))


def _domain_of(teacher_id: Any) -> str | None:
    """Returns a row's `teacher_id`; `None` for what is no string, as in [`~table.schema.teacher_counts`]."""
    return teacher_id if isinstance(teacher_id, str) else None


def resolve_loss_type(args: OfflineOPDConfig, columns: Iterable[str], required: str | None = None) -> str:
    """
    Returns the objective for rows with these columns.

    Args:
        args ([`OfflineOPDConfig`]): Arguments with `loss_type` and `ratio_clip`.
        columns (iterable of `str`): Columns of the rows.
        required (`str`, *optional*): Objective of the training rows, if these are evaluation rows.

    Raises:
        ValueError: If the rows lack a column that the objective needs.
    """
    has_topk = "teacher_topk_ids" in columns
    loss_type = required or args.loss_type
    if loss_type == "auto":
        loss_type = "topk" if has_topk else "sampled"
    if loss_type == "topk" and RESIDUAL in columns:
        raise ValueError(
            f"`loss_type='topk'` needs a teacher's top-k, and a residual table has none, only `{RESIDUAL}` of the "
            "sampled tokens: the top-k is another teacher's, and subtracting from it did not help where measured. Set "
            "`loss_type='sampled'`, or train and evaluate on scores of the teacher that wrote the SFT data."
        )
    if loss_type == "topk" and not has_topk:
        raise ValueError(
            "`loss_type='topk'` needs the columns `teacher_topk_ids` and `teacher_topk_logprobs` in the training and "
            "the evaluation rows. Score them with `score_rollouts(..., top_k=8)`, or set `loss_type='sampled'`."
        )
    if args.beta != type(args).beta and loss_type == "sampled":
        raise ValueError(
            f"`beta={args.beta}` chooses the divergence of `loss_type='topk'`, but the table has no top-k columns. "
            "Score it with `score_rollouts(..., top_k=8)`, or leave `beta` unset."
        )
    if args.ratio_clip is not None and loss_type == "topk":
        raise ValueError(
            "`ratio_clip` is a trust region of the sampled objective, but the table's top-k columns select "
            "`loss_type='topk'`. Set `loss_type='sampled'`, or leave `ratio_clip` unset."
        )
    if args.ratio_clip is not None and "ref_logprobs" not in columns:
        raise ValueError(
            "`ratio_clip` needs a `ref_logprobs` column: the trust region is around the policy that sampled the "
            "rollouts. Make it with `score_rollouts(..., ref_model=student)`."
        )
    return loss_type


# ---- Lengths ----


def _report_stretched(row_lengths: np.ndarray, limit: float, name: str) -> None:
    if (row_lengths >= limit).any():
        logger.warning(
            f"`{name}`: {int((row_lengths >= limit).sum())} rows have {limit} tokens or more. From there on, the "
            "longest row of a batch changes the rotary embeddings of all its rows, so that log-probabilities depend "
            f"on which rows are read together. Set the batch size to 1, or `max_length` to less than {limit}."
        )


def _advise(table: Dataset, loss_type: str, args: OfflineOPDConfig, items: int) -> None:
    """Warns of what was measured not to pay, see docs/evidence.md. With packing, `items` of a batch are packs."""
    if loss_type == "sampled" and {"teacher_logprobs", "ref_logprobs"} <= {*table.column_names}:
        spread = _spread_of_advantages(table, args.advantage_clip)
        if spread < LEAST_SPREAD:
            remedy = "leave `loss_type` unset" if "teacher_topk_ids" in table.column_names else "score with `top_k=8`"
            logger.warning(
                f"The advantages have a standard deviation of {spread:.3f} nats. Measured below {LEAST_SPREAD}, "
                f"the sampled update as in the paper cost accuracy, and the divergence on the teacher's top-k did "
                f"better (docs/evidence.md): {remedy}."
            )
    items_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    passes = args.max_steps * items_a_step / items if args.max_steps > 0 else args.num_train_epochs
    if passes > _MOST_PASSES:
        logger.warning(
            f"The {len(table)} training rows will be read {passes:.0f} times. Where measured, 13 passes paid, 38 did "
            "not: 1,000 rows read 38 times ended where 3,000 did that were read three times (docs/evidence.md). "
            "Sample more rows."
        )


def _spread_of_advantages(table: Dataset, clip: float) -> float:
    """Standard deviation of the clipped advantages before training, in nats a token, of the first rows."""
    names = ("teacher_logprobs", "ref_logprobs")
    batch = next(batches(table, names, 2000))
    teacher, ref = (flat_values(name, batch)[1].astype(float) for name in names)
    return float((teacher - ref).clip(-clip, clip).std())


def _check_weights(table: Dataset, weights: dict[str, float], name: str) -> None:
    """Refuses weights without rows, and rows without weights."""
    if TEACHER_ID not in table.column_names:
        raise TableError(
            f"`teacher_weights` weighs rows by their column `{TEACHER_ID}`, and `{name}` has none, only "
            f"{', '.join(table.column_names)}."
        )
    counts = column_counts(table, TEACHER_ID)
    if unknown := [teacher for teacher in counts if teacher not in weights]:
        row = table[TEACHER_ID][:].index(unknown[0])
        raise TableError(f"`{name}`, row {row}: {no_weight(unknown[0], weights)}")
    if unused := [teacher for teacher in weights if teacher not in counts]:
        raise TableError(
            f"`teacher_weights` has a weight for {', '.join(map(repr, unused))}, and no row of `{name}` has that "
            f"`{TEACHER_ID}`: it has {', '.join(map(repr, counts))}."
        )


def _fitting_lengths(dataset: Dataset, args: OfflineOPDConfig, name: str) -> np.ndarray:
    """Computes the number of tokens of each row after truncation, `(rows,)`, and warns of truncated completions.
    Raises `TableError` if no trainable token of a row is left."""
    prompts, completions = lengths(dataset)
    room = completion_room(prompts, args.max_completion_length, args.max_length)
    if (room < 1).any():
        row = int((room < 1).argmax())
        raise TableError(
            f"`{name}`, row {row}, column 'prompt_ids': a prompt of {prompts[row]} tokens leaves no room for a "
            f"completion within `max_length={args.max_length}` ({int((room < 1).sum())} such rows). Raise "
            "`max_length`, or filter them out."
        )
    lost = np.maximum(completions - room, 0)
    if "completion_mask" in dataset.column_names:
        cut = np.flatnonzero(lost)
        for row, mask in zip(cut, dataset.select(cut)["completion_mask"], strict=True):
            if not any(mask[: room[row]]):
                raise TableError(
                    f"`{name}`, row {row}, column 'completion_mask': all trainable tokens lie beyond the first "
                    f"{room[row]} of the completion and would be cut. Raise `max_completion_length` or `max_length`, "
                    "or filter such rows out."
                )
    if lost.any():
        logger.warning(
            f"`{name}`: {int((lost > 0).sum())} of {len(dataset)} completions are truncated on the right, "
            f"{int(lost.sum())} of {int(completions.sum())} completion tokens are lost. The limits are "
            f"`max_completion_length={args.max_completion_length}` and `max_length={args.max_length}`."
        )
    return prompts + np.minimum(completions, room)


class GroupedByLength(LengthGroupedSampler):
    """
    Sampler that groups rows by length. The order depends on the seed and the epoch only, so it is the same on all
    processes and in a resumed run.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer of the table.
    """

    def __init__(self, trainer: Trainer):
        args = trainer.args
        self.trainer, self.seed = trainer, args.seed if args.data_seed is None else args.data_seed
        super().__init__(
            args.train_batch_size * args.gradient_accumulation_steps,
            lengths=trainer.rows.row_lengths.tolist(),
            generator=torch.Generator(),
        )

    def __iter__(self):
        self.generator.manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        return super().__iter__()


# ---- Streams ----

_CHECKED = tuple(dict.fromkeys((*REQUIRED_COLUMNS, *TOKEN_COLUMNS)))
_RECORDED = (TEACHER_ID, "student_fingerprint", FILLER)


def in_arrow(stream: IterableDataset) -> IterableDataset:
    """
    Returns a stream that yields each row as an Arrow table of one row, from where the given one would begin.

    A format of the given stream is replaced. Functions that it was mapped with still see the rows in that format.
    """
    arrow = stream.with_format("arrow")
    if (state := stream._starting_state_dict) is not None:  # of `load_state_dict`, which `with_format` drops
        position = state["examples_iterable"]
        if position["type"] != "RebatchedArrowExamplesIterable":  # the source yields Python rows
            position = {"examples_iterable": position}
        arrow.load_state_dict({**state, "examples_iterable": position})
    return arrow


@dataclass
class RowCheck:
    """
    Reader of the rows of a stream, in the process that reads them. Each row must be valid, and have the columns and
    the k of the first row of the stream. A column with the value `None` counts as missing.

    A call takes rows as [`in_arrow`] yields them, and returns them as [`~table.schema.numpy_rows`] does.

    Args:
        floor (`float` or `None`): `teacher_logprob_floor`.
        vocab (`tuple`): Result of [`~table.vocab_limits`].
        columns (`frozenset[str]`): Columns of the first row, see [`columns_of`].
        top_k (`int`): k of the first row.
        rows (`int`): Number of rows that this process has validated.

    Raises:
        TableError: For the first row that is not valid; rows are counted from 0 in each process.
    """

    floor: float | None
    vocab: tuple[int | None, int | None]
    columns: frozenset[str]
    top_k: int = 0
    rows: int = 0

    def __call__(self, rows: list[pa.Table]) -> list[Row]:
        try:
            table = self._joined(rows)
            self._check_columns(table)
            summary = validate_rows(
                table.select([name for name in _CHECKED if name in self.columns]),
                first_row=self.rows,
                vocab_size=self.vocab[0],
                topk_vocab_size=self.vocab[1],
                top_k=self.top_k,
                teacher_logprob_floor=self.floor,
            )
        except TableError as error:
            raise TableError(f"{error} (Rows are counted in the order in which this process read them.)") from None
        self.rows, self.top_k = self.rows + len(rows), summary.top_k
        return numpy_rows(table.select([name for name in table.column_names if name in (*self.columns, *_RECORDED)]))

    def _joined(self, rows: list[pa.Table]) -> pa.Table:
        read = (*_CHECKED, *_RECORDED)
        rows = [row.select([name for name in read if name in row.column_names]) for row in rows]
        joined = rows[0]
        try:
            # Rows of Python objects have types of their own: an empty list or `None` fits any.
            joined = pa.concat_tables(rows, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            for i, row in enumerate(rows[1:], start=self.rows + 1):
                try:
                    joined = pa.concat_tables([joined, row], promote_options="permissive")
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    raise TableError(
                        f"Row {i}: its types are not those of the rows before it: {error}. Cast all rows to the types "
                        "of `table_features`, or make the table with `score_rollouts`."
                    ) from None
        return joined.combine_chunks()

    def _check_columns(self, table: pa.Table) -> None:
        unlike = {}  # the first row that has a column that it must not have, or lacks one that it must have
        for name in _CHECKED:
            present = np.full(len(table), name in table.column_names)
            if name in table.column_names and table[name].null_count:
                present = table[name].is_valid().to_numpy()
            if (wrong := present != (name in self.columns)).any():
                unlike[name] = int(wrong.argmax())
        if not unlike:
            return
        name = min(unlike, key=unlike.get)
        problem = "missing, but the first row of the stream has it" if name in self.columns else (
            "present, but the first row of the stream lacks it"
        )  # fmt: skip
        raise TableError(
            f"Row {self.rows + unlike[name]}, column `{name}`: {problem}. A column is in every row of a stream or in "
            "none: drop it with `remove_columns`, or score all rows with the same options."
        )


def columns_of(row: pa.Table) -> frozenset[str]:
    """Returns the columns that training reads and in which a table of one row has a value."""
    return frozenset(name for name in _CHECKED if name in row.column_names and not row[name].null_count)


class WholeStream(torch.utils.data.IterableDataset):
    """
    Stream of tables of one row that every process reads completely, to take its part of each batch.

    accelerate would distribute the shards of a [`~datasets.IterableDataset`] over the processes, if there are enough.
    Processes with fewer rows would then train on theirs more often, or keep the others waiting at the end of an epoch.

    Args:
        stream ([`~datasets.IterableDataset`]): The rows, see [`in_arrow`].
        fill (`int`, *optional*, defaults to `1`): The number of rows is rounded up to a multiple of this by copies of
            the first row, marked with `FILLER`. Otherwise accelerate would repeat rows to fill the last batch, without
            a mark.
    """

    def __init__(self, stream: IterableDataset, fill: int = 1):
        self.stream, self.fill = stream, fill

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[pa.Table]:
        rows = 0
        for rows, row in enumerate(self.stream, start=1):
            if rows == 1:
                first = row
            yield row
        for _ in range(-rows % self.fill):
            yield first.append_column(FILLER, pa.array([True]))
