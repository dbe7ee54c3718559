"""The rows that are trained and evaluated on: which are valid for this student, who scored and who sampled them.

A table is validated whole before the student is loaded. Of a stream the first row is, and the others where they are
read; the process that trains on them counts their teachers.
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
from ..identity.cards import read_model_card
from ..identity.consistency import Verdict, check_teacher_consistency
from ..identity.fingerprint import is_id, with_evidence
from ..models import check_positions
from ..processes import on_main_process
from ..table.schema import REQUIRED_COLUMNS, TOKEN_COLUMNS, TableSummary, lengths, validate_rows, validate_table
from .collator import FILLER, Row, padded_length, too_long

if TYPE_CHECKING:
    from transformers import Trainer

    from .config import OfflineOPDConfig
    from .student import Student

logger = logging.getLogger(__name__)


class TrainingRows:
    """
    The tables and streams of a trainer.

    Args:
        student ([`Student`]): Who learns from them.
        args ([`OfflineOPDConfig`]): Limits of rows, the objective, and how strictly teachers are checked.

    Attributes:
        loss_type (`str`, *optional*): The objective, which the columns of the training rows decide.
        trained, evaluated ([`TeacherCheck`]): Teachers of the rows of each. Two, so that the card names the teachers
            that trained the model and not those that only evaluated it.
        measures_off_policy (`bool`): Whether other weights sampled the training rows, and `ref_logprobs` tell how far
            these are from the student.
    """

    def __init__(self, student: Student, args: OfflineOPDConfig):
        self.student, self.args = student, args
        self.trained, self.evaluated = TeacherCheck(student, args), TeacherCheck(student, args)
        self.loss_type: str | None = None
        self.measures_off_policy = False
        # What was prepared: of streams, with what validates their rows.
        self._prepared: WeakKeyDictionary[Dataset | IterableDataset, RowCheck | None] = WeakKeyDictionary()

    def prepare(self, dataset: Dataset | IterableDataset, name: str, training: bool = False) -> set[str]:
        """
        Validates a `Dataset` whole, or the first row of a stream, against the student and the objective.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The rows.
            name (`str`): What messages call them.
            training (`bool`, *optional*, defaults to `False`): Whether they are trained on.

        Returns:
            `set[str]`: Their columns.

        Raises:
            TableError: If a row is not valid, or the stream is empty.
            TeacherConsistencyError: As `args.teacher_consistency` says.
            TypeError: If it is neither a `Dataset` nor an `IterableDataset`.
        """
        check = self.trained if training else self.evaluated
        if isinstance(dataset, IterableDataset):
            columns = self._prepare_stream(dataset, name, check)
        elif isinstance(dataset, Dataset):
            columns = self._prepare_table(dataset, name, check)
        else:
            raise TypeError(f"`{name}` must be a `Dataset` or an `IterableDataset`, got `{type(dataset).__name__}`.")
        if training and check.verdict is not None and check.verdict.off_policy:
            self.measures_off_policy = "ref_logprobs" in columns
            if not self.measures_off_policy:
                logger.warning(
                    "Without a `ref_logprobs` column nothing can measure how far off-policy the rollouts are. "
                    "`score_rollouts(..., ref_model=...)` writes it."
                )
        return columns

    def is_prepared(self, dataset: Any) -> bool:
        """Whether [`prepare`] has seen a dataset."""
        return isinstance(dataset, Dataset | IterableDataset) and dataset in self._prepared

    def check_of(self, stream: IterableDataset) -> RowCheck:
        """What validates the rows of a prepared stream; a new one, that has counted none."""
        return replace(self._prepared[stream])

    def _prepare_stream(self, stream: IterableDataset, name: str, check: TeacherCheck) -> set[str]:
        row = next(iter(stream), None)
        if row is None:
            raise TableError(f"`{name}` is an empty stream.")
        columns = columns_of(row)

        def judge() -> tuple[RowCheck, Verdict]:
            rows = RowCheck(self.args.teacher_logprob_floor, self.student.vocab_limits, columns)
            rows([row])
            teachers, samplers = ([row.get(column)] for column in ("teacher_fingerprint", "student_fingerprint"))
            return replace(rows, rows=0), check.judge(teachers, "the stream", sampled_by=samplers)

        self._prepared[stream], check.verdict = on_main_process(self.args.distributed_state, judge)
        check.first = row.get("teacher_fingerprint")
        self.loss_type = resolve_loss_type(self.args, columns, self.loss_type)
        return columns

    def _prepare_table(self, table: Dataset, name: str, check: TeacherCheck) -> set[str]:
        args, student = self.args, self.student
        try:
            summary = validate_table(
                table, student.tokenizer, student.config, teacher_logprob_floor=args.teacher_logprob_floor
            )
        except TableError as error:
            raise TableError(f"`{name}`: {error}") from None
        check.teachers.update(summary.teacher_fingerprints)
        if args.teacher_consistency != "off":
            check.verdict = on_main_process(args.distributed_state, lambda: check.judge(table, name))
        columns = set(table.column_names)
        self.loss_type = resolve_loss_type(args, columns, self.loss_type)
        self._report(summary, name)
        _report_truncation(table, args, name)
        row_lengths = fitting_lengths(table, args)
        whose = "the student (`max_length` truncates completions)"
        check_positions(row_lengths, student.positions, whose, f"`{name}`: row")
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
                f"`{name}`: {summary.foreign_topk} of the teacher's top-k tokens are none that the student has. Their "
                "probability counts with that of all other tokens."
            )


class TeacherCheck:
    """
    Whether a student may learn from rows, and who scored and who sampled them.

    Args:
        student ([`Student`]): Who learns.
        args ([`OfflineOPDConfig`]): Says how strictly.

    Attributes:
        verdict ([`Verdict`], *optional*): On the rows so far; `None` where nothing was checked.
        first (`str`, *optional*): Teacher of the first row of a stream.
        teachers, samplers (`Counter`): Rows of each teacher and each student; of a stream, of those that this process
            has met.
    """

    def __init__(self, student: Student, args: OfflineOPDConfig):
        self.student, self.mode = student, args.teacher_consistency
        self.verdict: Verdict | None = None
        self.first: str | None = None
        self.teachers: Counter[str] = Counter()
        self.samplers: Counter[str | None] = Counter()
        self._of_all: tuple[Counter[str], Counter[str | None]] | None = None

    def judge(
        self, table: Dataset | Iterable[str], name: str, sampled_by: Iterable[str] = (), mode: str | None = None
    ) -> Verdict:
        """Applies the consistency rule to a table, or to the teachers and students of some rows."""
        return check_teacher_consistency(
            self.student.card,
            table,
            sampled_by=sampled_by,
            student_fingerprint=self.student.fingerprint,
            mode=mode or self.mode,
            student=self.student.name,
            table_name=name,
            tokenizer=self.student.tokenizer,
        )

    def meet(self, batch: dict[str, Any]) -> None:
        """Judges and counts the rows of a stream's batch, and takes their fingerprints out of it."""
        teachers, samplers = (batch.pop(name, None) for name in ("teacher_fingerprint", "student_fingerprint"))
        if teachers is None:
            return
        if not ({*teachers} <= self.teachers.keys() and {*samplers} <= self.samplers.keys()):
            met = sorted({*self.teachers, *teachers})
            self.verdict = self.judge(met, "the stream", sampled_by={*self.samplers, *samplers})
        self.teachers.update(teachers)
        self.samplers.update(samplers)

    def resume(self, checkpoint: str) -> None:
        """Counts on from the rows that trained a checkpoint, as its card has them after those of earlier rounds."""
        self.teachers, self.samplers = Counter(), Counter()
        if not PartialState().is_main_process:
            return  # in the sum of all processes they count once
        earlier = len(self.student.card.get("opd_rounds") or [])
        rounds = read_model_card(checkpoint).get("opd_rounds") or []
        if len(rounds) <= earlier or "rows" not in rounds[earlier]:
            logger.warning(
                f"{checkpoint} has no card that says which rows of the stream trained it: the card of this run will "
                "only have those of the steps from here on."
            )
            return
        for counts, entries in ((self.teachers, "teachers"), (self.samplers, "sampled_by")):
            for entry in rounds[earlier].get(entries) or []:
                name = with_evidence(entry["id"], entry["evidence"]) if is_id(entry["id"]) else entry["id"]
                counts[name] += entry["rows"]
        self.samplers[None] += self.teachers.total() - self.samplers.total()

    @property
    def of_all(self) -> tuple[Counter[str], Counter[str | None]]:
        """Rows of each teacher and of each student, of all processes as far as they were gathered."""
        return self._of_all or (self.teachers, self.samplers)

    def gather(self) -> None:
        """Adds up the rows of all processes, which all call this."""
        if PartialState().num_processes > 1:
            parts = gather_object([(self.teachers, self.samplers)])
            self._of_all = tuple(sum(counts, Counter()) for counts in zip(*parts, strict=True))


def resolve_loss_type(args: OfflineOPDConfig, columns: Iterable[str], required: str | None = None) -> str:
    """
    The objective that rows with these columns are trained with.

    Args:
        args ([`OfflineOPDConfig`]): Its `loss_type` and `ratio_clip`.
        columns (iterable of `str`): Columns of the rows.
        required (`str`, *optional*): The objective of the training rows, which evaluation rows have to serve too.

    Raises:
        ValueError: If the rows lack a column that it needs.
    """
    has_topk = "teacher_topk_ids" in columns
    loss_type = required or args.loss_type
    if loss_type == "auto":
        loss_type = "topk" if has_topk else "sampled"
    if loss_type == "topk" and not has_topk:
        raise ValueError(
            "`loss_type='topk'` needs the columns `teacher_topk_ids` and `teacher_topk_logprobs` in the training and "
            "the evaluation rows. Score them with `score_rollouts(..., top_k=8)`, or set `loss_type='sampled'`."
        )
    if args.beta != 1.0 and loss_type == "sampled":
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


def _rooms(prompts: np.ndarray, args: OfflineOPDConfig) -> np.ndarray:
    """Completion tokens that fit behind each prompt: [`~collator.completion_room`] of all rows, `(rows,)`."""
    room = np.full(len(prompts), np.iinfo(np.int64).max)
    if args.max_completion_length is not None:
        room = np.minimum(room, args.max_completion_length)
    if args.max_length is not None:
        room = np.minimum(room, args.max_length - prompts)
    return room


def fitting_lengths(dataset: Dataset, args: OfflineOPDConfig) -> np.ndarray:
    """Tokens of each row as it is read, truncated: `(rows,)`."""
    prompts, completions = lengths(dataset)
    return prompts + np.minimum(completions, _rooms(prompts, args))


def _report_truncation(dataset: Dataset, args: OfflineOPDConfig, name: str) -> None:
    prompts, completions = lengths(dataset)
    room = _rooms(prompts, args)
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


class GroupedByLength(LengthGroupedSampler):
    """
    Draws an order for each epoch that all processes draw, and again if a run is resumed in it.

    Args:
        trainer ([`~transformers.Trainer`]): Whose training table is read.
    """

    def __init__(self, trainer: Trainer):
        args = trainer.args
        self.trainer, self.seed = trainer, args.seed if args.data_seed is None else args.data_seed
        super().__init__(
            args.train_batch_size * args.gradient_accumulation_steps,
            lengths=fitting_lengths(trainer.train_dataset, args).tolist(),
            generator=torch.Generator(),
        )

    def __iter__(self):
        self.generator.manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        return super().__iter__()


# ---- Streams ----


@dataclass
class RowCheck:
    """
    Validates rows of a stream as they arrive, in whichever process reads them: each by itself, and that it has the
    columns and the k of the first row of the stream. A `None` counts as a missing value.

    Args:
        floor (`float` or `None`): `teacher_logprob_floor`.
        vocab (`tuple`): Of [`~table.vocab_limits`].
        columns (`frozenset[str]`): Those of the first row, see [`columns_of`].
        top_k (`int`): Of the first row.
        rows (`int`): How many this process has validated.

    Raises:
        TableError: For the first row that is not valid; rows are counted from 0 in each process.
    """

    floor: float | None
    vocab: tuple[int | None, int | None]
    columns: frozenset[str]
    top_k: int = 0
    rows: int = 0

    def __call__(self, rows: list[Row]) -> None:
        try:
            for i, row in enumerate(rows):
                self._check_columns(row, self.rows + i)
            summary = validate_rows(
                pa.Table.from_pylist([{name: row[name] for name in self.columns} for row in rows]),
                first_row=self.rows,
                vocab_size=self.vocab[0],
                topk_vocab_size=self.vocab[1],
                top_k=self.top_k,
                teacher_logprob_floor=self.floor,
            )
        except TableError as error:
            raise TableError(f"{error} (Rows are counted in the order in which this process read them.)") from None
        self.rows, self.top_k = self.rows + len(rows), summary.top_k

    def _check_columns(self, row: Row, number: int) -> None:
        here = columns_of(row)
        if here == self.columns:
            return
        name = next(name for name in (*REQUIRED_COLUMNS, *TOKEN_COLUMNS) if (name in here) != (name in self.columns))
        problem = "missing, but the first row of the stream has it" if name in self.columns else (
            "there, but the first row of the stream lacks it"
        )  # fmt: skip
        raise TableError(
            f"Row {number}, column `{name}`: {problem}. A column is in every row of a stream or in none: drop it "
            "with `remove_columns`, or score all rows with the same options."
        )


def columns_of(row: Row) -> frozenset[str]:
    """The columns that training reads of which a row has a value."""
    return frozenset(name for name in (*REQUIRED_COLUMNS, *TOKEN_COLUMNS) if row.get(name) is not None)


class WholeStream(torch.utils.data.IterableDataset):
    """
    A stream that every process reads whole, to take its part of each batch.

    Of a [`~datasets.IterableDataset`] with enough shards, accelerate would give each process some: those with fewer
    rows would train on theirs more often, or leave the others waiting at the end of an epoch.

    Args:
        stream ([`~datasets.IterableDataset`]): The rows.
        fill (`int`, *optional*, defaults to `1`): After the last row come as many copies of the first, marked by
            `FILLER`, as make the number of rows a multiple of this. accelerate repeats rows where the last batch is
            too small for all processes, and nothing tells these from the others.
    """

    def __init__(self, stream: IterableDataset, fill: int = 1):
        self.stream, self.fill = stream, fill

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Row]:
        rows = 0
        for rows, row in enumerate(self.stream, start=1):
            if rows == 1:
                first = row
            yield row
        for _ in range(-rows % self.fill):
            yield {**first, FILLER: True}
