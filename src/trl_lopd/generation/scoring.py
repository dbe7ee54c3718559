"""Scoring of rollouts: teacher log-probabilities of the tokens that the student sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets

from ..errors import TableError
from ..identity.cards import count_teachers, entry, read_dataset_card, record_of
from ..identity.fingerprint import (
    evidence_of,
    fingerprint_loaded,
    fingerprint_teacher,
    is_id,
    same_teacher,
    tokenizer_digest,
    tokenizer_part,
    weights_part,
    with_evidence,
)
from ..identity.probes import probes_of_run
from ..identity.vocabulary import contradicting_text, different_tokens, distinct_ids, say, tokenizer_of
from ..models import (
    check_positions,
    free_memory,
    hub_kwargs,
    load_model,
    load_tokenizer,
    pinned_kwargs,
    positions_of,
    warn_of_altering_kwargs,
)
from ..names import as_name
from ..processes import on_main_process, own_device, processes
from ..table.schema import (
    RESIDUAL,
    TOPK_COLUMNS,
    TableRows,
    column_counts,
    describe,
    digest_columns,
    lengths,
    refuse_no_dataset,
    rows_digest,
    table_features,
    teacher_counts,
    validate_rollouts,
    validate_table,
    vocab_limits,
)
from ..table.store import read_pins
from .addresses import is_address, server_at
from .options import ScoringOptions, takes
from .runs import ShardedRun, take
from .several import naming, of_each, recorded, refuse_list, remove_parts, row_numbers, run_parts, split_rows
from .teachers import DEFAULT_BUDGET, LocalTeacher, RowError, Scores, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..identity.fingerprint import TeacherFingerprint

    OneTeacher = str | Path | PreTrainedModel | Teacher

logger = logging.getLogger(__name__)


@takes(ScoringOptions)
def score_rollouts(
    dataset: Dataset,
    teacher: OneTeacher | dict[str, OneTeacher],
    *,
    teacher_column: str | None = None,
    output_dir: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | dict[str, PreTrainedTokenizerBase] | None = None,
    ref_model: str | Path | PreTrainedModel | None = None,
    fingerprint: TeacherFingerprint | dict[str, TeacherFingerprint] | None = None,
    teacher_card: dict[str, Any] | None = None,
    options: ScoringOptions,
) -> Dataset:
    """
    Scores every completion token once (Lightning OPD, stage 2).

    Log-probabilities are at temperature 1 over the full vocabulary, computed in float32 from the model's logits on
    chunks of tokens, so that logits of all tokens are never in memory together. Rows of similar length are scored
    together; the result has the order of the input.

    With `output_dir`, each shard is written to disk when it is done. A run that was killed continues when it is
    started again with the same arguments, and makes the same table. `load_dataset(output_dir)` and
    `load_table(output_dir)` read it. Under `accelerate launch`, every process scores its share of the shards.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rollouts with `prompt_ids` and `completion_ids`, as `collect_rollouts` makes. Other columns are kept.
        teacher (`str`, `Path`, [`~transformers.PreTrainedModel`], [`Teacher`] or `dict`):
            A local directory or Hub id, loaded in its own dtype; a loaded model; or a served one, given by the address
            of its server, such as `"http://localhost:8000"`, or as a `VLLMServer` or `SGLangServer`. Several teachers
            are a `dict` of such by name, `{"math": ..., "code": ...}`: each scores the rows that name it, one teacher
            after the other, and signs them. `processing_class`, `fingerprint` and `teacher_card` are then `dict`s by
            name, too, and all other options are those of all.
        teacher_column (`str`, *optional*):
            With several teachers, the column with the name of each row's teacher. Defaults to `"teacher_id"`, as in
            TRL; the names in another column are copied to `teacher_id`.
        output_dir (`str` or `Path`, *optional*):
            Directory to write the table to, shard by shard. Without it, the table is only in memory, and lost if the
            process dies.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's tokenizer, for its fingerprint and probes. Loaded from the teacher's path if not given. If
            the rows were sampled with another tokenizer, the ids in the rows must stand for the same tokens in both.
        ref_model (`str`, `Path` or [`~transformers.PreTrainedModel`], *optional*):
            The student that sampled the rollouts, or an adapter, for rollouts without `ref_logprobs`. It scores them
            in the same way, and is in memory together with a local teacher.
        fingerprint ([`TeacherFingerprint`], *optional*):
            The teacher's fingerprint. If not given, it is computed from the checkpoint of a path, independent of the
            dtype and quantization it is loaded with, or from the weights of a loaded model. A given one counts as
            declared; for a served teacher, it declares which model the server serves.
        teacher_card (`dict`, *optional*):
            Card with the probes of a served teacher, see `verify_served_teacher`. A server that answers them correctly
            counts as that teacher.
        **options:
            The fields of [`~generation.options.ScoringOptions`]: `top_k` (8), `max_batch_tokens`, `rows_per_shard`,
            `revision`, `trust_remote_code`, `dtype`, `model_init_kwargs`. `ref_model` is loaded with the same options
            except the revision.

    Returns:
        [`~datasets.Dataset`]: The rows with the columns of `table_features` added, validated. It carries a record of
        the models that sampled and scored the rows, the digest of its rows, and the teacher's answers to the probes:
        see `cards` and `probes`. The card in `output_dir` holds the same.

    Raises:
        TableError: Another model than `ref_model` sampled the rows, or they cannot be scored: columns are missing or
            present already, a row names none of several teachers, a teacher has no rows, a prompt or completion is
            empty, ids are outside the teacher's vocabulary or stand for other tokens there, or the teacher answers
            with NaN.
        ShardError: `output_dir` has other content or another run's table, or another process writes to it.
        ServerError: A served teacher cannot be used.
        ValueError: An option out of range, several processes without `output_dir`, or a served teacher without a
            fingerprint or card.
    """
    given = {"processing_class": processing_class, "fingerprint": fingerprint, "teacher_card": teacher_card}
    dataset, scorers = scorers_of(dataset, teacher, teacher_column, ref_model, options, **given)
    if isinstance(teacher, dict):
        return _score_parts(dataset, scorers, output_dir)
    table, record, _ = _run(dataset, scorers[None][1], output_dir)
    return _recorded(dataset, table, [record], output_dir)


def scorers_of(
    dataset: Dataset,
    teacher: OneTeacher | dict[str, OneTeacher],
    teacher_column: str | None,
    ref_model: str | Path | PreTrainedModel | None,
    options: ScoringOptions,
    **given: Any,
) -> tuple[Dataset, dict[str | None, tuple[Dataset, Scorer]]]:
    """
    Finds who scores which rows, and whether they can, before anything is scored; for the arguments see
    [`score_rollouts`].

    Returns:
        `tuple[Dataset, dict]`: The rows, with `teacher_id` if there are several teachers; and each teacher's rows and
        its [`Scorer`], by its name, or `None` if there is one.
    """
    refuse_list(teacher, "teacher")
    ref_model = as_name(ref_model)
    if is_address(ref_model):
        raise ValueError("`ref_model` is loaded here: give its directory or Hub id, not the address of a server.")
    added = ["teacher_logprobs", "teacher_fingerprint", *(TOPK_COLUMNS if options.top_k else ())]
    added += ["ref_logprobs"] if ref_model is not None else []
    check_rollouts(dataset, added)
    if not isinstance(teacher, dict):
        if teacher_column is not None:
            raise ValueError("`teacher_column` is for several teachers, a dictionary of them by name.")
        return dataset, {None: (dataset, _resolve(teacher, dataset, ref_model, options, **given))}
    dataset, parts = split_rows(dataset, teacher, teacher_column)
    given_each = of_each(teacher, **given)
    scorers = {}
    for name, rows in parts.items():
        with naming(name):
            scorers[name] = rows, _resolve(teacher[name], rows, ref_model, options, **given_each[name])
    return dataset, scorers


def _resolve(
    teacher: OneTeacher,
    dataset: Dataset,
    ref_model: str | PreTrainedModel | None,
    options: ScoringOptions,
    processing_class: PreTrainedTokenizerBase | None = None,
    fingerprint: TeacherFingerprint | None = None,
    teacher_card: dict[str, Any] | None = None,
) -> Scorer:
    """Finds out who a teacher is, and whether it can score these rows, before anything is scored."""
    state, teacher = processes(), as_name(teacher)
    if is_address(teacher):
        teacher = server_at(teacher)
    is_served = hasattr(teacher, "score")
    if is_served:
        tokenizer = processing_class or getattr(teacher, "processing_class", None)
        if hasattr(teacher, "self_test"):
            teacher.processing_class = tokenizer
        record = on_main_process(state, lambda: _entry_of_served(teacher, dataset, fingerprint, teacher_card))
    else:
        kwargs = hub_kwargs(options.init_kwargs)
        tokenizer = processing_class or load_tokenizer(teacher, **kwargs)
        is_declared = fingerprint is not None
        is_declared |= isinstance(teacher, str) and warn_of_altering_kwargs(options.init_kwargs, teacher)
        # Only one process reads the gigabytes of a checkpoint.
        fingerprint = fingerprint or on_main_process(state, lambda: fingerprint_teacher(teacher, tokenizer, **kwargs))
        record = entry(fingerprint, "declared" if is_declared else None)
    record["scoring"] = {"top_k": options.top_k}
    scorer = Scorer(teacher, is_served, record, tokenizer, ref_model, options)
    on_main_process(state, lambda: _check_reference(dataset, scorer))
    if same := on_main_process(state, lambda: _same_tokens_as(dataset, scorer)):
        record["same_tokens_as"] = same
    scorer.check_lengths(dataset)
    return scorer


def _run(
    dataset: Dataset, scorer: Scorer, output_dir: str | Path | None, whole: ShardedRun | None = None
) -> tuple[Dataset, dict[str, Any], dict[str, int]]:
    """Has a teacher score rows: the table, the teacher's entry, and the counts of the run."""
    scorer.settle_budget(output_dir)
    numbers, tokens, record = row_numbers(dataset), lengths(dataset)[1], scorer.record
    pins = _pins(dataset, scorer) if output_dir is not None else {}
    with ShardedRun("Scoring", "token", tokens, scorer.options.rows_per_shard, output_dir, pins, whole) as run:
        for shard, span in run.pending():
            part = scorer.score(dataset.select(span), numbers[span.start : span.stop], run.advance)
            run.write(shard, part, completion_tokens=int(tokens[span].sum()))
        if not scorer.is_served and run.state.is_main_process:
            # If the table was finished by an earlier run, its card has the probes.
            card = read_dataset_card(output_dir) if output_dir is not None else {}
            if probes := probes_of_run(card, record["id"], lambda: scorer.local_teacher.model, scorer.tokenizer):
                record["probes"] = probes
        if whole is not None:
            scorer.unload()
        return run.dataset(), record, run.counts()


def _score_parts(dataset: Dataset, parts: dict[str, tuple[Dataset, Scorer]], output_dir: str | Path | None) -> Dataset:
    """Has each of several teachers score its rows, and puts them together."""
    scorers = {name: scorer for name, (_, scorer) in parts.items()}
    first = next(iter(scorers.values()))
    tokens, pins = lengths(dataset)[1], {}
    if output_dir is not None:
        # What else decides the scores is among those of the parts.
        teachers = {name: scorer.teacher_id for name, scorer in scorers.items()}
        pins = _pins(dataset, first) | {"teacher": teachers}

    with ShardedRun("Scoring", "token", tokens, first.options.rows_per_shard, output_dir, pins) as run:
        entries = [scorer.record for scorer in scorers.values()]
        entries += run_parts(run, parts, _run, "teachers")
        table = _recorded(dataset, run.dataset(), entries, output_dir)
        remove_parts(run)
        return table


@dataclass
class Scorer:
    """
    Teacher and optional reference model, which are loaded when they are first needed.

    Attributes:
        teacher (`str`, [`~transformers.PreTrainedModel`] or [`Teacher`]): The teacher.
        is_served (`bool`): Whether it is on a server.
        record (`dict`): Its entry for the card.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Its tokenizer.
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*): The student that sampled the rollouts.
        options ([`ScoringOptions`]): Options of the scoring.
    """

    teacher: str | PreTrainedModel | Teacher
    is_served: bool
    record: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None
    ref_model: str | PreTrainedModel | None
    options: ScoringOptions

    def __post_init__(self) -> None:
        self.max_batch_tokens = self.options.max_batch_tokens

    @property
    def teacher_id(self) -> str:
        """Returns its fingerprint with its evidence, for the rows."""
        return with_evidence(self.record["id"], self.record["evidence"])

    @property
    def ref_kwargs(self) -> dict[str, Any]:
        """Returns the loading arguments of the reference model: without the revision, which is the teacher's."""
        return {name: value for name, value in self.options.init_kwargs.items() if name != "revision"}

    @cached_property
    def ref_id(self) -> str:
        """Returns the id of the reference model. Gigabytes are read for it, so only the main process may call this."""
        return fingerprint_teacher(self.ref_model, **hub_kwargs(self.ref_kwargs)).id

    @cached_property
    def local_teacher(self) -> LocalTeacher:
        """Loads the teacher in this process."""
        return self._load(self.teacher, self.options.init_kwargs)

    @cached_property
    def reference(self) -> LocalTeacher:
        """Loads the reference model in this process."""
        return self._load(self.ref_model, self.ref_kwargs)

    def _load(self, model: str | PreTrainedModel, init_kwargs: dict[str, Any]) -> LocalTeacher:
        # Ids in the padding of the vocabulary are not tokens, and the student's vocabulary may have less padding.
        num_tokens = vocab_limits(self.tokenizer)[0]
        return LocalTeacher(load_model(model, own_device(processes(), init_kwargs)), self.max_batch_tokens, num_tokens)

    def unload(self) -> None:
        """Lets go of the models that were loaded, for the next teacher."""
        for name in ("local_teacher", "reference"):
            self.__dict__.pop(name, None)
        free_memory()

    def check_lengths(self, dataset: Dataset) -> None:
        """Checks that the models can read rows of these lengths. Errors name the row of the whole table."""
        numbers = row_numbers(dataset)
        tokens = np.zeros(numbers.max() + 1, np.int64)
        tokens[numbers] = np.add(*lengths(dataset))
        if not self.is_served:
            check_positions(tokens, positions_of(self.teacher, **hub_kwargs(self.options.init_kwargs)), "the teacher")
        if self.ref_model is not None:
            positions = positions_of(self.ref_model, **hub_kwargs(self.ref_kwargs))
            check_positions(tokens, positions, "the reference model")

    def settle_budget(self, output_dir: str | Path | None) -> None:
        """Determines the number of tokens in a forward pass. As it influences the last bits of scores, a resumed run
        uses the same number as before."""
        if self.max_batch_tokens is not None or self.is_served:
            return
        state = processes()
        pinned = on_main_process(state, lambda: read_pins(output_dir).get("max_batch_tokens") if output_dir else None)
        # Without CUDA the default is used, so a teacher that is not loaded yet need not be loaded for a measurement.
        measures = not isinstance(self.teacher, str) or torch.cuda.is_available()
        self.max_batch_tokens = pinned or (
            on_main_process(state, lambda: self.local_teacher.find_budget()) if measures else DEFAULT_BUDGET
        )

    def score(self, rows: Dataset, numbers: np.ndarray, advance: Callable[[int], object]) -> Dataset:
        """Adds the scores to rows. `numbers` are their indices in the whole table, for errors."""
        ref = None
        # The reference model scores first, so that its errors show before the teacher scores.
        if self.ref_model is not None:
            ref = _score(self.reference, rows, numbers, 0)
        teacher = self.teacher if self.is_served else self.local_teacher
        scores = _score(teacher, rows, numbers, self.options.top_k, advance)
        return with_scores(rows, self.teacher_id, self.options.top_k, scores, ref)


def _pins(dataset: Dataset, scorer: Scorer) -> dict[str, Any]:
    """Returns everything that the scores depend on, which must be the same in a resumed run."""
    state, student_id = processes(), None
    if scorer.ref_model is not None:
        student_id = on_main_process(state, lambda: scorer.ref_id)
    return {
        "run": "scores",
        "rollouts": on_main_process(state, lambda: describe(dataset)),
        "teacher": scorer.teacher_id,
        "top_k": scorer.options.top_k,
        "ref_model": student_id,
        "max_batch_tokens": scorer.max_batch_tokens,
        "model_init_kwargs": pinned_kwargs(scorer.options.init_kwargs),
    }


def _recorded(
    dataset: Dataset, table: Dataset, teachers: list[dict[str, Any]], output_dir: str | Path | None
) -> Dataset:
    """Validates the table, and adds a record of its teachers and of the students in the record of the rollouts."""
    state, columns = processes(), digest_columns(table.column_names)
    # Scores of -inf are accepted here with any floor, because the trainer decides on them.
    floored, digest = on_main_process(
        state, lambda: (validate_table(table, teacher_logprob_floor=-1.0).floored, rows_digest(table, columns))
    )
    if floored and state.is_main_process:
        logger.warning(
            f"{floored} teacher log-probabilities are -inf: the teacher gives those tokens no probability at all. The "
            "trainer accepts them only with `teacher_logprob_floor`."
        )
    students = _students_of(dataset)
    entries = {"students": students} if students else {}
    entries["teachers"] = count_teachers(teacher_counts(table), teachers)
    return recorded(table, entries, output_dir, columns=columns, digests=[{"rows": len(table), "digest": digest}])


def _students_of(dataset: Dataset) -> list[dict[str, Any]]:
    """Returns the entries of the students that sampled rows, of these rows alone."""
    record = record_of(dataset)
    known = record.get("students") or []
    if "student_fingerprint" in dataset.column_names:
        entries = count_teachers(column_counts(dataset, "student_fingerprint"), known)
        return [{key: value for key, value in entry.items() if key != "share"} for entry in entries]
    if known and record.get("rows") != len(dataset):
        logger.warning(
            f"The rows have no column `student_fingerprint`, and the record of who sampled them is of "
            f"{record.get('rows')} rows, not of these {len(dataset)}: the table will not say who sampled them. Keep "
            "the column."
        )
        return []
    return known


def _score(
    teacher: Teacher,
    rows: Dataset,
    numbers: np.ndarray,
    top_k: int,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Scores]:
    """Scores each row. Errors name the row of the whole table."""
    values = TableRows(rows.select_columns(["prompt_ids", "completion_ids"])).__getitems__(list(range(len(rows))))
    sequences = [np.concatenate([row["prompt_ids"], row["completion_ids"]]) for row in values]
    try:
        return teacher.score(sequences, [len(row["completion_ids"]) for row in values], top_k, advance)
    except RowError as error:
        raise TableError(f"Row {numbers[error.row]}: {error}") from None
    except RuntimeError as error:
        if (row := getattr(error, "row", None)) is None:
            raise
        raise type(error)(f"Row {numbers[row]} of the table: {error}", int(numbers[row])) from error


def with_scores(
    rows: Dataset, teacher_id: str, top_k: int, teacher: list[Scores], ref: list[Scores] | None
) -> Dataset:
    """Adds the columns of the scores to the rows."""
    offsets = np.cumsum([0] + [len(scores.logprobs) for scores in teacher]).astype(np.int32)
    columns = {
        "teacher_logprobs": _lists(offsets, pa.array(np.concatenate([scores.logprobs for scores in teacher]))),
        "teacher_fingerprint": pa.array([teacher_id] * len(rows)),
    }
    if top_k:
        for name, field in zip(TOPK_COLUMNS, ("topk_ids", "topk_logprobs"), strict=True):
            values = np.concatenate([getattr(scores, field) for scores in teacher])
            columns[name] = _lists(offsets, pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), top_k))
    if ref is not None:
        columns["ref_logprobs"] = _lists(offsets, pa.array(np.concatenate([scores.logprobs for scores in ref])))
    features = table_features(top_k=top_k, ref_logprobs=ref is not None)
    scores = Dataset(pa.table(columns).cast(type(features)({name: features[name] for name in columns}).arrow_schema))
    rows = take(rows, range(len(rows))) if rows._indices is not None else rows
    return concatenate_datasets([rows, scores], axis=1)


def _entry_of_served(
    teacher: Teacher, dataset: Dataset, fingerprint: TeacherFingerprint | None, card: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the entry of a served teacher: that of the card, if it answers the probes, or of the declared model."""
    probed = None
    if hasattr(teacher, "self_test"):
        # Use the longest row, which the server must be able to score.
        row = dataset[int(np.add(*lengths(dataset)).argmax())]
        ids = [*row["prompt_ids"], *row["completion_ids"]][:64]
        # The test needs at least four tokens, and a row may have only two.
        probed = teacher.self_test(card, ids if len(ids) >= 4 else ids * 2)
    if probed is not None:
        if fingerprint is not None and not same_teacher(probed, fingerprint):
            raise ValueError(
                f"{teacher!r} answers the probes of {probed}, and `fingerprint` says that it is "
                f"{fingerprint.id}. Give the one that it is, or the card alone."
            )
        return entry(probed)
    if fingerprint is None:
        raise ValueError(
            f"Nothing says which teacher {teacher!r} is. Give `teacher_card`, a card with its probes (that of the "
            "student, `read_model_card(student)`, if `generate_sft_data` made the data), or declare it with "
            "`fingerprint`."
        )
    return entry(fingerprint, "declared")


def _check_reference(dataset: Dataset, scorer: Scorer) -> None:
    """
    Holds the reference model against the models that the rows say they were sampled from.

    Raises:
        TableError: If it is another one: its `ref_logprobs` would not be those of the policy that sampled.
    """
    samplers = [value for value in column_counts(dataset, "student_fingerprint") if value and is_id(value)]
    if scorer.ref_model is None or not samplers:
        return
    try:
        parts = {weights_part(scorer.ref_id)}
        if not isinstance(scorer.ref_model, str):  # which may be its checkpoint, cast on loading
            parts.add(weights_part(fingerprint_loaded(scorer.ref_model).id))
    except (OSError, ValueError) as error:
        logger.warning(f"Whether `ref_model` sampled the rollouts is not checked: {error}")
        return
    others = [value for value in samplers if weights_part(value) not in parts]
    message = (
        f"Rows were sampled by {', '.join(sorted(others))}, and `ref_model` is {scorer.ref_id}: its "
        "log-probabilities would not be those of the policy that sampled. Give the model that sampled the rows, or "
        "score without `ref_model`."
    )
    if any(evidence_of(value) != "declared" for value in others):
        raise TableError(message)
    if others:
        logger.warning(f"{message} The rows only declare their model, so this may be it, in another dtype.")


def _same_tokens_as(dataset: Dataset, scorer: Scorer) -> list[str]:
    """
    Compares the tokenizers that the rows were sampled with to the teacher's, on the ids in the rows. It uses the
    student's tokenizer if it is available, otherwise the text of the rows.

    Returns:
        `list[str]`: Tokenizers, other than the teacher's, in which every id stands for the same token, given by the
        tokenizer part of fingerprints.

    Raises:
        TableError: If an id stands for another token.
    """
    teacher_id, tokenizer = scorer.teacher_id, scorer.tokenizer
    samplers = [value for value in column_counts(dataset, "student_fingerprint") if value and is_id(value)]
    others = {tokenizer_part(sampler) for sampler in samplers} - {tokenizer_part(teacher_id)}
    if not others:
        return []
    students = record_of(dataset).get("students") or []
    available = {tokenizer_part(entry["id"]): result[0] for entry in students if (result := tokenizer_of(entry))}
    if scorer.ref_model is not None:
        ref_tokenizer = load_tokenizer(scorer.ref_model, **hub_kwargs(scorer.ref_kwargs))
        available[tokenizer_digest(ref_tokenizer)[:8]] = ref_tokenizer
    refusal = (
        "Score with the teacher that shares the student's tokenizer. (Added tokens that no row holds, special roles "
        "and a padded vocabulary may differ.)"
    )
    compared, ids = set(), None
    for part in others & available.keys() if tokenizer is not None else ():
        ids = distinct_ids(dataset) if ids is None else ids
        if differences := different_tokens(available[part], tokenizer, ids):
            raise TableError(
                "The rows were sampled with another tokenizer than the teacher's: "
                f"{say(differences, 'the student', 'the teacher')}. {refusal}"
            )
        compared.add(part)
    unknown = others - compared
    if unknown and tokenizer is not None and "completion" in dataset.column_names:
        if contradiction := contradicting_text(dataset, tokenizer):
            raise TableError(
                f"The rows were sampled with another tokenizer than the teacher's: {contradiction}. {refusal}"
            )
        compared, unknown = others, set()
    if unknown:
        logger.warning(
            f"The rows were sampled with another tokenizer ({', '.join(sorted(unknown))}) than that of the teacher "
            f"{teacher_id}, and nothing tells whether their ids mean the same: neither the student's tokenizer nor "
            "the text of the rows is available. Training treats that as declared. Pass the student as `ref_model`, or "
            "keep the column `completion`."
        )
    return sorted(compared)


def check_rollouts(dataset: Dataset, added: list[str]) -> None:
    """
    Checks that rollouts can be scored, and that they do not have the `added` columns already.

    Raises:
        TableError: If they cannot be scored; the message names the row and column.
    """
    refuse_no_dataset(dataset, "dataset")
    if "ref_logprobs" in added and "ref_logprobs" in dataset.column_names:
        raise TableError(
            "The rollouts have `ref_logprobs` already, as `collect_rollouts` gives them. Leave `ref_model` out, or "
            'remove them to compute them again: `dataset.remove_columns("ref_logprobs")`.'
        )
    if present := [name for name in (*added, RESIDUAL) if name in dataset.column_names]:
        raise TableError(
            f"The rollouts have the column {present[0]!r} already. To score them again, score the rollouts that this "
            f"table was made of, or remove it first: `dataset.remove_columns({present})`."
        )
    if len(dataset) == 0:
        raise TableError("There are no rollouts to score.")
    validate_rollouts(dataset)


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
