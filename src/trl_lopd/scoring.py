"""Rollouts and a teacher become a scored table: teacher log-probabilities of the tokens that the student sampled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from .cards import attach_record, entry, record_of
from .fingerprint import fingerprint_teacher
from .head import LogitTransform, score_tokens
from .models import load_model, load_tokenizer
from .probes import probe_model
from .table import (
    TOPK_COLUMNS,
    TableError,
    TableRows,
    digest_columns,
    lengths,
    rows_digest,
    table_features,
    validate_table,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .fingerprint import TeacherFingerprint

logger = logging.getLogger(__name__)


def score_rollouts(
    dataset: Dataset,
    teacher: str | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    top_k: int = 8,
    ref_model: str | PreTrainedModel | None = None,
    max_batch_tokens: int = 16384,
    fingerprint: TeacherFingerprint | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Scores every completion token once with a local transformers teacher (Lightning OPD, stage 2).

    Log-probabilities are at temperature 1 over the full vocabulary, computed in float32 from the model's logits on
    chunks of tokens; logits of all tokens never exist together. Rows of like length are scored together; the result
    has the order of the input.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rollouts with `prompt_ids` and `completion_ids`, as `collect_rollouts` makes. Other columns are kept.
        teacher (`str` or [`~transformers.PreTrainedModel`]):
            A local directory or Hub id, loaded in its own dtype, or a loaded model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's, for its fingerprint and probes. Loaded from the teacher's path if not given.
        top_k (`int`, *optional*, defaults to `8`):
            Also store the teacher's most likely tokens at each position. `0` stores none; the trainer then has only
            the sampled-token objective.
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The student that sampled the rollouts, or an adapter; scores them into `ref_logprobs` the same way.
        max_batch_tokens (`int`, *optional*, defaults to `16384`):
            Tokens of a forward pass, padding included. A longer row is scored alone.
        fingerprint ([`TeacherFingerprint`], *optional*):
            Computed if not given: from the checkpoint that a path names, whatever dtype or quantization
            `model_init_kwargs` load it in, or from a loaded model as it is in memory.
        model_init_kwargs (`dict`, *optional*):
            For loading models from a path, for instance `{"device_map": "auto"}`.

    Returns:
        [`~datasets.Dataset`]: The rows with the columns of `table_features` added, validated. It carries a record of
        who sampled and who scored them, the digest of its rows, and the teacher's answers to the probes: see `cards`
        and `probes`.

    Raises:
        TableError: Rows that cannot be scored: columns missing or there already, empty prompts or completions, ids
            outside the teacher's vocabulary, or a teacher that answers with NaN.
        ValueError: An option out of range.
    """
    if top_k < 0 or max_batch_tokens < 1:
        raise ValueError(f"`top_k` is 0 or more and `max_batch_tokens` positive; got {top_k} and {max_batch_tokens}.")
    added = ["teacher_logprobs", "teacher_fingerprint", *(TOPK_COLUMNS if top_k else ())]
    added += ["ref_logprobs"] if ref_model is not None else []
    _check_rollouts(dataset, added)
    revision = (model_init_kwargs or {}).get("revision")
    tokenizer = tokenizer or load_tokenizer(teacher, revision=revision)
    fingerprint = fingerprint or fingerprint_teacher(teacher, tokenizer, revision=revision)

    prompt_lengths, completion_lengths = lengths(dataset)
    rollouts = TableRows(dataset.select_columns(["prompt_ids", "completion_ids"]))
    total = int(completion_lengths.sum())
    if total * max(top_k, 1) > np.iinfo(np.int32).max:
        raise ValueError(
            f"{total} completion tokens with `top_k={top_k}` do not fit one Arrow array. Score the rollouts in parts, "
            "`dataset.shard(...)`, and join the tables with `concatenate_datasets`."
        )
    offsets = np.concatenate([[0], np.cumsum(completion_lengths)]).astype(np.int32)
    batches = list(_batches(prompt_lengths + completion_lengths, max_batch_tokens))

    def score(model: PreTrainedModel, k: int, desc: str):
        vocab = model.config.get_text_config().vocab_size
        if k > vocab:
            raise ValueError(f"`top_k={k}` is more than the teacher's vocabulary of {vocab} tokens.")
        logprobs = np.empty(total, np.float32)
        topk_ids, topk_logprobs = np.empty((total, k), np.int32), np.empty((total, k), np.float16)
        was_training = model.training
        model.eval()
        try:
            with tqdm(total=total, desc=desc, unit="token") as progress:
                for rows in batches:
                    batch = rollouts.__getitems__(rows)
                    for row, *scores in zip(rows, *_score_batch(model, batch, k, vocab, rows), strict=True):
                        if np.isnan(scores[0]).any():
                            raise TableError(
                                f"Row {row}: the model answers with NaN. Load it in another dtype, float32 or "
                                "bfloat16."
                            )
                        part = slice(offsets[row], offsets[row + 1])
                        logprobs[part], topk_ids[part], topk_logprobs[part] = scores
                    progress.update(int(completion_lengths[rows].sum()))
        finally:
            model.train(was_training)
        return logprobs, topk_ids, topk_logprobs

    # The student first: if it cannot be scored, that shows before the teacher's hours are spent.
    ref_logprobs = None
    if ref_model is not None:
        ref_logprobs = score(load_model(ref_model, model_init_kwargs), 0, "Scoring with the student")[0]
    teacher = load_model(teacher, model_init_kwargs)
    try:
        probes = probe_model(teacher, tokenizer)
    except ValueError as error:
        probes = None
        logger.warning(f"A served copy of this teacher will have no probes to be held against: {error}")
    logprobs, topk_ids, topk_logprobs = score(teacher, top_k, "Scoring with the teacher")
    columns = {
        "teacher_logprobs": _lists(offsets, pa.array(logprobs)),
        "teacher_fingerprint": pa.array([fingerprint.id] * len(dataset)),
    }
    if top_k:
        starts = np.arange(0, total * top_k + 1, top_k, dtype=np.int32)
        for name, values in zip(TOPK_COLUMNS, (topk_ids, topk_logprobs), strict=True):
            columns[name] = _lists(offsets, _lists(starts, pa.array(values.ravel())))
    if ref_logprobs is not None:
        columns["ref_logprobs"] = _lists(offsets, pa.array(ref_logprobs))

    features = table_features(top_k=top_k, ref_logprobs=ref_model is not None)
    scores = Dataset(pa.table(columns)).cast(type(features)({name: features[name] for name in columns}))
    table = concatenate_datasets([dataset, scores], axis=1)
    # Scores of -inf are the trainer's to accept or refuse; any floor lets them pass here.
    if floored := validate_table(table, teacher_logprob_floor=-1.0).floored:
        logger.warning(
            f"{floored} teacher log-probabilities are -inf: the teacher gives those tokens no probability at all. The "
            "trainer accepts them only with `teacher_logprob_floor`."
        )
    about = entry(fingerprint, rows=len(table), share=1.0, scoring={"top_k": top_k}, probes=probes)
    columns = digest_columns(table.column_names)
    record = {
        "students": record_of(dataset).get("students", []),
        "teachers": [about],
        "rows": len(table),
        "completion_tokens": total,
        "skipped_rows": 0,
        "columns": columns,
        "digests": [{"rows": len(table), "digest": rows_digest(table, columns)}],
    }
    attach_record(table, record)
    return table


def _check_rollouts(dataset: Dataset, added: list[str]) -> None:
    missing = [name for name in ("prompt_ids", "completion_ids") if name not in dataset.column_names]
    if missing:
        raise TableError(f"The rollouts have no column {missing[0]!r}. `collect_rollouts` makes it from prompts.")
    if present := [name for name in added if name in dataset.column_names]:
        raise TableError(
            f"The rollouts have the column {present[0]!r} already. To score them again, remove it first: "
            f"`dataset.remove_columns({present})`."
        )
    if len(dataset) == 0:
        raise TableError("There are no rollouts to score.")
    for name, of_row in zip(("prompt_ids", "completion_ids"), lengths(dataset), strict=True):
        if (of_row == 0).any():
            raise TableError(f"Row {int((of_row == 0).argmax())}, column {name!r} is empty. Drop the row.")


def _batches(row_lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Rows of like length, longest first so that memory runs out at once or never; padded size within `max_tokens`."""
    order = np.argsort(-row_lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, max_tokens // int(row_lengths[order[start]]))
        yield order[start : start + size]
        start += size


@torch.inference_mode()
def _score_batch(model: PreTrainedModel, batch: list[dict[str, np.ndarray]], top_k: int, vocab: int, rows: np.ndarray):
    """Scores of the completion tokens of each row: `(completion,)`, `(completion, k)` and `(completion, k)` arrays."""
    sequences = [np.concatenate([row["prompt_ids"], row["completion_ids"]]) for row in batch]
    counts = [len(row["completion_ids"]) for row in batch]
    for row, sequence in zip(rows, sequences, strict=True):
        if sequence.min() < 0 or sequence.max() >= vocab:
            raise TableError(
                f"Row {row}: token id {sequence.max() if sequence.min() >= 0 else sequence.min()} is not in the "
                f"vocabulary of {vocab} tokens of the model that scores. Teacher and student must share a tokenizer."
            )
    width = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention_mask, scored = torch.zeros_like(input_ids), torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        input_ids[i, : len(sequence)] = torch.from_numpy(sequence)
        attention_mask[i, : len(sequence)] = 1
        scored[i, len(sequence) - count : len(sequence)] = True
    # Adapters live in the layers of the model that PEFT wraps.
    model = model.get_base_model() if is_peft_model(model) else model
    device = model.get_input_embeddings().weight.device
    hidden = model.base_model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
    ).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    scored = scored[:, 1:]
    logprobs, topk_ids, topk_logprobs = score_tokens(
        hidden[scored.to(hidden.device)].to(head.weight.device),
        head.weight,
        head.bias,
        input_ids[:, 1:][scored].to(head.weight.device),
        top_k,
        LogitTransform.of(model.config),
    )
    return [
        np.split(scores.cpu().numpy(), np.cumsum(counts)[:-1])
        for scores in (logprobs, topk_ids.int(), topk_logprobs.half())
    ]


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
