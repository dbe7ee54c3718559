"""Rollouts and a teacher become a scored table: teacher log-probabilities of the tokens that the student sampled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets

from ..errors import TableError
from ..identity.cards import attach_record, entry, read_dataset_card, record_of, write_record
from ..identity.fingerprint import fingerprint_teacher, is_id, tokenizer_digest, tokenizer_part, with_evidence
from ..identity.probes import probes_of_run
from ..identity.vocabulary import contradicting_text, different_tokens, distinct_ids, say, tokenizer_of
from ..models import check_positions, hub_kwargs, load_model, load_tokenizer, pinned_kwargs, positions_of
from ..names import as_name
from ..processes import on_main_process, own_device, processes, wait_for_everyone
from ..table.schema import (
    TOPK_COLUMNS,
    TableRows,
    column_counts,
    describe,
    digest_columns,
    holds_ids,
    lengths,
    refuse_no_dataset,
    rows_digest,
    table_features,
    validate_table,
    vocab_limits,
)
from ..table.store import read_pins
from .runs import ShardedRun, check_whole_numbers
from .teachers import DEFAULT_BUDGET, LocalTeacher, RowError, Scores, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..identity.fingerprint import TeacherFingerprint

logger = logging.getLogger(__name__)


def score_rollouts(
    dataset: Dataset,
    teacher: str | Path | PreTrainedModel | Teacher,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    top_k: int = 8,
    ref_model: str | Path | PreTrainedModel | None = None,
    max_batch_tokens: int | None = None,
    rows_per_shard: int = 4096,
    fingerprint: TeacherFingerprint | None = None,
    teacher_card: dict[str, Any] | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Scores every completion token once (Lightning OPD, stage 2).

    Log-probabilities are at temperature 1 over the full vocabulary, computed in float32 from the model's logits on
    chunks of tokens; logits of all tokens never exist together. Rows of like length are scored together; the result
    has the order of the input.

    With `output_dir`, each shard is on disk when it is done: a run that was killed continues when it is started again
    with the same arguments, and gives the same table. `load_dataset(output_dir)` and `load_table(output_dir)` read it.
    Under `accelerate launch`, every process scores its share of the shards.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rollouts with `prompt_ids` and `completion_ids`, as `collect_rollouts` makes. Other columns are kept.
        teacher (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`Teacher`]):
            A local directory or Hub id, loaded in its own dtype; a loaded model; or a served one, see `VLLMServer`
            and `SGLangServer`.
        output_dir (`str` or `Path`, *optional*):
            Where to write the table, shard by shard. Without it all is in memory, and lost if the process dies.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's, for its fingerprint and probes. Loaded from the teacher's path if not given. Where it is not
            the one that the rows were sampled with, the ids in the rows have to mean the same to both.
        top_k (`int`, *optional*, defaults to `8`):
            Also store the teacher's most likely tokens at each position. `0` stores none; the trainer then has only
            the sampled-token objective.
        ref_model (`str`, `Path` or [`~transformers.PreTrainedModel`], *optional*):
            The student that sampled the rollouts, or an adapter, for rollouts without `ref_logprobs`: it scores them
            the same way, in memory beside a local teacher.
        max_batch_tokens (`int`, *optional*):
            Tokens of a forward pass, padding and cached prompts included. A longer row is scored alone. By default
            16,384 on a CPU, and on CUDA as many as fit, measured once for a table. Halved when memory runs out.
        rows_per_shard (`int`, *optional*, defaults to `4096`):
            Rows that are sorted by length together, and written together.
        fingerprint ([`TeacherFingerprint`], *optional*):
            The teacher's. Computed if not given: from the checkpoint that a path names, whatever dtype or quantization
            `model_init_kwargs` load it in, or from a loaded model as it is in memory. For a served teacher it is what
            you declare it to be.
        teacher_card (`dict`, *optional*):
            Card with the probes of a served teacher, see `verify_served_teacher`: if it answers them, it counts as
            that teacher.
        model_init_kwargs (`dict`, *optional*):
            For loading models from a path, for instance `{"device_map": "auto"}`.

    Returns:
        [`~datasets.Dataset`]: The rows with the columns of `table_features` added, validated. It carries a record of
        who sampled and who scored them, the digest of its rows, and the teacher's answers to the probes: see `cards`
        and `probes`. The card in `output_dir` holds the same.

    Raises:
        TableError: Rows that cannot be scored: columns missing or there already, empty prompts or completions, ids
            outside the teacher's vocabulary or with another meaning there, or a teacher that answers with NaN.
        ShardError: `output_dir` holds something else, another run's table, or is being written to.
        ServerError: A served teacher that cannot be used.
        ValueError: An option out of range, several processes without `output_dir`, or a served teacher that nothing
            names.
    """
    teacher, ref_model = as_name(teacher), as_name(ref_model)
    check_whole_numbers(0, top_k=top_k)
    check_whole_numbers(1, rows_per_shard=rows_per_shard)
    if max_batch_tokens is not None:
        check_whole_numbers(1, max_batch_tokens=max_batch_tokens)
    state = processes()
    added = ["teacher_logprobs", "teacher_fingerprint", *(TOPK_COLUMNS if top_k else ())]
    added += ["ref_logprobs"] if ref_model is not None else []
    _check_rollouts(dataset, added)

    found = hub_kwargs(model_init_kwargs)
    is_served = hasattr(teacher, "score")
    if is_served:
        about = on_main_process(state, lambda: _about_served(teacher, dataset, fingerprint, teacher_card))
    else:
        tokenizer = tokenizer or load_tokenizer(teacher, **found)
        # Gigabytes are read once, not by every process.
        fingerprint = fingerprint or on_main_process(state, lambda: fingerprint_teacher(teacher, tokenizer, **found))
        about = entry(fingerprint)
    teacher_id = with_evidence(about["id"], about["evidence"])
    read_by = tokenizer or getattr(teacher, "tokenizer", None)
    if same := on_main_process(state, lambda: _same_tokens_as(dataset, teacher_id, read_by, ref_model, found)):
        about["same_tokens_as"] = same

    total = np.add(*lengths(dataset))
    for model, role in ((teacher, "the teacher"), (ref_model, "the reference model")):
        if model is not None and not hasattr(model, "score"):
            check_positions(total, positions_of(model, **found), role)

    @functools.cache  # once, and not at all if everything is scored already
    def load(model: str | PreTrainedModel) -> LocalTeacher:
        # A vocabulary that is padded has ids that are no token; the student's may be padded less.
        tokens = vocab_limits(tokenizer)[0]
        return LocalTeacher(load_model(model, own_device(state, model_init_kwargs)), max_batch_tokens, tokens)

    if max_batch_tokens is None and not is_served:
        # Batches decide the last bits of scores: a run that continues takes the size of the run before.
        known = on_main_process(state, lambda: read_pins(output_dir).get("max_batch_tokens") if output_dir else None)
        # Nothing is loaded to learn what there is nothing to measure for.
        measures = not isinstance(teacher, str) or torch.cuda.is_available()
        max_batch_tokens = known or (
            on_main_process(state, lambda: load(teacher).find_budget()) if measures else DEFAULT_BUDGET
        )
    pins = {}
    if output_dir is not None:
        rollouts = on_main_process(state, lambda: describe(dataset))
        student_id = None
        if ref_model is not None:
            student_id = on_main_process(state, lambda: fingerprint_teacher(ref_model, **found).id)
        pins = {
            "run": "scores",
            "rollouts": rollouts,
            "teacher": teacher_id,
            "top_k": top_k,
            "ref_model": student_id,
            "max_batch_tokens": max_batch_tokens,
            "model_init_kwargs": pinned_kwargs(model_init_kwargs),
        }

    tokens = lengths(dataset)[1]
    with ShardedRun("Scoring", "token", tokens, rows_per_shard, output_dir, pins) as run:
        for shard, span in run.pending():
            rows = dataset.select(span)
            scored = {}
            # The student first: if it cannot be scored, that shows before the teacher's time is spent.
            if ref_model is not None:
                scored["ref"] = _score(load(ref_model), rows, span.start, 0)
            scored["teacher"] = _score(teacher if is_served else load(teacher), rows, span.start, top_k, run.advance)
            part = _with_scores(rows, teacher_id, top_k, **scored)
            run.write(shard, part, completion_tokens=int(tokens[span].sum()))
        if not is_served and state.is_main_process:
            # A table that was finished before has a card that holds them.
            card = read_dataset_card(output_dir) if output_dir is not None else {}
            if probes := probes_of_run(card, lambda: load(teacher).model, tokenizer):
                about["probes"] = probes
        table = run.dataset()

    columns = digest_columns(table.column_names)
    # Scores of -inf are the trainer's to accept or refuse; any floor lets them pass here.
    floored, digest = on_main_process(
        state, lambda: (validate_table(table, teacher_logprob_floor=-1.0).floored, rows_digest(table, columns))
    )
    if floored and state.is_main_process:
        logger.warning(
            f"{floored} teacher log-probabilities are -inf: the teacher gives those tokens no probability at all. The "
            "trainer accepts them only with `teacher_logprob_floor`."
        )
    about |= {"rows": len(table), "share": 1.0, "scoring": {"top_k": top_k}}
    students = record_of(dataset).get("students")
    record = {
        **({"students": students} if students else {}),
        "teachers": [about],
        "rows": len(table),
        "completion_tokens": int(tokens.sum()),
        "skipped_rows": 0,
        "columns": columns,
        "digests": [{"rows": len(table), "digest": digest}],
    }
    attach_record(table, record)
    if output_dir is not None and state.is_main_process:
        write_record(output_dir, record)
    wait_for_everyone(state)
    return table


def _score(
    teacher: Teacher, rows: Dataset, first_row: int, top_k: int, advance: Callable[[int], object] = lambda tokens: None
) -> list[Scores]:
    """Scores of each row; errors name the row of the whole table."""
    values = TableRows(rows.select_columns(["prompt_ids", "completion_ids"])).__getitems__(list(range(len(rows))))
    sequences = [np.concatenate([row["prompt_ids"], row["completion_ids"]]) for row in values]
    try:
        return teacher.score(sequences, [len(row["completion_ids"]) for row in values], top_k, advance)
    except RowError as error:
        raise TableError(f"Row {first_row + error.row}: {error}") from None
    except RuntimeError as error:
        if (row := getattr(error, "row", None)) is None:
            raise
        raise type(error)(f"Row {first_row + row} of the table: {error}", first_row + row) from error


def _with_scores(
    rows: Dataset, teacher_id: str, top_k: int, teacher: list[Scores], ref: list[Scores] | None = None
) -> Dataset:
    """The rows with the columns that scoring adds."""
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
    return concatenate_datasets([rows.flatten_indices() if rows._indices is not None else rows, scores], axis=1)


def _about_served(
    teacher: Teacher, dataset: Dataset, fingerprint: TeacherFingerprint | None, card: dict[str, Any] | None
) -> dict[str, Any]:
    """The entry of a served teacher: the one whose probes it answers, or what it is declared to be."""
    probed = None
    if hasattr(teacher, "self_test"):
        # The longest row, which it has to score in any case.
        row = dataset[int(np.add(*lengths(dataset)).argmax())]
        ids = [*row["prompt_ids"], *row["completion_ids"]][:64]
        # The test takes four tokens or more; every row has two.
        probed = teacher.self_test(card, ids if len(ids) >= 4 else ids * 2)
    if probed is not None:
        return entry(probed)
    if fingerprint is None:
        raise ValueError(
            f"Nothing says which teacher {teacher!r} is. Give `teacher_card`, a card with its probes (that of the "
            "student, `read_model_card(student)`, if `generate_sft_data` made the data), or declare it with "
            "`fingerprint`."
        )
    return entry(fingerprint, "declared")


def _same_tokens_as(
    dataset: Dataset,
    teacher_id: str,
    tokenizer: PreTrainedTokenizerBase | None,
    ref_model: str | PreTrainedModel | None,
    found: dict[str, Any],
) -> list[str]:
    """
    The tokenizers, other than the teacher's own, that the rows were sampled with and that mean the same by every id
    in them: the parts of their fingerprints. The student's tokenizer settles it where it can be found, else the text
    of the rows.

    Raises:
        TableError: if an id means something else.
    """
    samplers = [id for id in column_counts(dataset, "student_fingerprint") if id and is_id(id)]
    others = {tokenizer_part(id) for id in samplers} - {tokenizer_part(teacher_id)}
    if not others:
        return []
    students = record_of(dataset).get("students") or []
    known = {tokenizer_part(entry["id"]): of_entry[0] for entry in students if (of_entry := tokenizer_of(entry))}
    if ref_model is not None:
        of_ref = load_tokenizer(ref_model, **found)
        known[tokenizer_digest(of_ref)[:8]] = of_ref
    refusal = (
        "Score with the teacher that shares the student's tokenizer. (Added tokens that no row holds, special roles "
        "and a padded vocabulary may differ.)"
    )
    settled, ids = set(), None
    for part in others & known.keys() if tokenizer is not None else ():
        ids = distinct_ids(dataset) if ids is None else ids
        if differences := different_tokens(known[part], tokenizer, ids):
            raise TableError(
                "The rows were sampled with another tokenizer than the teacher's: "
                f"{say(differences, 'the student', 'the teacher')}. {refusal}"
            )
        settled.add(part)
    left = others - settled
    if left and tokenizer is not None and "completion" in dataset.column_names:
        if contradiction := contradicting_text(dataset, tokenizer):
            raise TableError(
                f"The rows were sampled with another tokenizer than the teacher's: {contradiction}. {refusal}"
            )
        settled, left = others, set()
    if left:
        logger.warning(
            f"The rows were sampled with another tokenizer ({', '.join(sorted(left))}) than that of the teacher "
            f"{teacher_id}, and nothing tells whether their ids mean the same: neither the student's tokenizer nor "
            "the text of the rows is there. Training counts that as declared. Pass the student as `ref_model`, or "
            "keep the column `completion`."
        )
    return sorted(settled)


def _check_rollouts(dataset: Dataset, added: list[str]) -> None:
    refuse_no_dataset(dataset, "dataset")
    missing = [name for name in ("prompt_ids", "completion_ids") if name not in dataset.column_names]
    if missing:
        raise TableError(f"The rollouts have no column {missing[0]!r}. `collect_rollouts` makes it from prompts.")
    if "ref_logprobs" in added and "ref_logprobs" in dataset.column_names:
        raise TableError(
            "The rollouts have `ref_logprobs` already, as `collect_rollouts` gives them. Leave `ref_model` out, or "
            'compute them anew: `dataset.remove_columns("ref_logprobs")`.'
        )
    if present := [name for name in added if name in dataset.column_names]:
        raise TableError(
            f"The rollouts have the column {present[0]!r} already. To score them again, score the rollouts that this "
            f"table was made of, or remove it first: `dataset.remove_columns({present})`."
        )
    if len(dataset) == 0:
        raise TableError("There are no rollouts to score.")
    for name in ("prompt_ids", "completion_ids"):
        if not holds_ids(dataset, name):
            raise TableError(
                f"Column {name!r} holds {dataset.data.schema.field(name).type}, where lists of token ids are needed. "
                "`collect_rollouts` makes them from prompts."
            )
        first = 0
        for batch in dataset.select_columns([name]).with_format("arrow").iter(1000):
            column = batch[name].combine_chunks()
            sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            if (sizes == 0).any():
                row = int((sizes == 0).argmax())
                what = "empty" if column[row].is_valid else "null"
                raise TableError(f"Row {first + row}, column {name!r} is {what}. Drop the row.")
            if (ids := column.flatten()).null_count:
                at = ids.is_null().to_numpy(zero_copy_only=False).argmax()
                row = int(np.searchsorted(sizes.cumsum(), at, side="right"))
                raise TableError(f"Row {first + row}, column {name!r} has a null among its token ids. Drop the row.")
            first += len(sizes)
    _check_entries(dataset)


def _check_entries(dataset: Dataset) -> None:
    """Raises a `TableError`, before the scoring and not after it, if a column has not one entry a completion token."""
    names, first = [name for name in ("completion_mask", "ref_logprobs") if name in dataset.column_names], 0
    for batch in dataset.select_columns(["completion_ids", *names]).with_format("arrow").iter(1000):
        sizes = {}
        for name in ("completion_ids", *names):
            column = batch[name].combine_chunks()
            if not hasattr(column.type, "value_type"):
                raise TableError(f"Column {name!r} holds {column.type}, where lists are needed. Remove the column.")
            sizes[name] = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        for name in names:
            if (wrong := sizes[name] != sizes["completion_ids"]).any():
                row = int(wrong.argmax())
                raise TableError(
                    f"Row {first + row}, column {name!r} has {sizes[name][row]} entries for the "
                    f"{sizes['completion_ids'][row]} tokens in 'completion_ids'. Remove the column, or make it anew."
                )
        first += len(batch)


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
