"""Another teacher's scores, less the part of them that recurs: Lightning OPD 2.0 (arXiv 2607.28449).

For a teacher that did not write the student's SFT data, `d = log pi_T - log pi_ref` of a sampled token has two parts:
what the teacher says of this token in this place, and how it writes in general. The second recurs, so it can be
predicted from the token id, the position in the completion and the surprisal, on rollouts of other prompts; only the
rest is to be learnt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value

from ..errors import TableError
from ..identity.cards import attach_record, record_of
from ..identity.consistency import check_rows
from ..table.schema import (
    RESIDUAL,
    TOPK_COLUMNS,
    batches,
    digest_columns,
    flat_values,
    prompt_and_row_hashes,
    refuse_no_dataset,
    rows_digest,
    validate_table,
)

logger = logging.getLogger(__name__)

# Rows that are in memory at a time.
_BATCH_ROWS = 1000
# The share of variance explained below which it warns.
_LEAST_EXPLAINED = 0.05


@dataclass(frozen=True)
class _Grid:
    """The parameters of a fit, see [`residualize_table`]."""

    folds: int
    position_bins: int
    surprisal_bins: int
    max_surprisal: float
    smoothing: float

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("position_bins", 1), ("surprisal_bins", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is a whole number of at least {least}, not {value!r}.")
        for name in ("max_surprisal", "smoothing"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class _Tokens:
    """The completion tokens of some rows, one after another, `(tokens,)` each.

    Attributes:
        sizes: Completion tokens of each row, `(rows,)`.
        teacher: Teacher's score, nats, float64.
        difference: `teacher` less `ref_logprobs`.
        weight: 1 over the trained tokens of the row; 0 for tokens that are not trained on.
        fold: Fold of the row.
        token: Token id.
        context: Bin of the position and the surprisal.
    """

    sizes: np.ndarray
    teacher: np.ndarray
    difference: np.ndarray
    weight: np.ndarray
    fold: np.ndarray
    token: np.ndarray
    context: np.ndarray


def residualize_table(
    table: Dataset,
    *,
    folds: int = 5,
    position_bins: int = 8,
    surprisal_bins: int = 8,
    max_surprisal: float = 10.0,
    smoothing: float = 50.0,
    teacher_logprob_floor: float | None = None,
) -> Dataset:
    """
    Subtracts the recurring part from the scores of a teacher that did not write the student's SFT data (Lightning OPD
    2.0, arXiv 2607.28449).

    With `d = log pi_T - log pi_ref` of each sampled token, the recurring part is `b = m_token / 2 + m_context / 2`:
    the mean of `d` over the tokens with the same id, and over those with the same position in the completion
    (`t / |y|`, in `position_bins`) and the same surprisal (`-log pi_ref` up to `max_surprisal`, in `surprisal_bins`).
    Both are cross-fitted: the rows of a prompt are in one of `folds`, by a hash of `prompt_ids`, and a token's means
    are those of the other folds. Each completion has a total weight of 1, spread over its trained tokens. Rare groups
    shrink towards the mean of all tokens of these folds, and groups that these do not have take it.

    The result has `residual_logprobs`, `log pi_T - b`, in the place of `teacher_logprobs`, and no top-k columns: it is
    for `loss_type="sampled"`. The consistency check accepts it with the evidence `"residual"`. It recovers a part of
    what another teacher's scores cost; docs/teacher-consistency.md says how much was measured, and what does better.

    Args:
        table ([`~datasets.Dataset`]):
            Scored rollouts of one teacher, with `ref_logprobs`. Residualize before splitting off held-out rows.
        folds (`int`, *optional*, defaults to `5`):
            Number of folds.
        position_bins, surprisal_bins (`int`, *optional*, defaults to `8`):
            Number of bins of equal width. The paper does not give them, nor the next two.
        max_surprisal (`float`, *optional*, defaults to `10.0`):
            Surprisals above this many nats are in the last bin.
        smoothing (`float`, *optional*, defaults to `50.0`):
            How many tokens of average weight, at the mean of all tokens, are added to each group.
        teacher_logprob_floor (`float`, *optional*):
            Replaces scores of -inf, in nats, as in [`OfflineOPDConfig`]. Otherwise they are an error.

    Returns:
        [`~datasets.Dataset`]: The table, its rows in the same order. Its record has the parameters and the fit under
        `residual`: `explained_variance`, the share of the weighted variance of `d` that `b` explains on the rows that
        it was not fitted on; `rows` and trained `tokens`; and the `digest` of the rows that it was made of.

    Raises:
        TableError: The table is not valid, has no `ref_logprobs`, is a residual already or of several teachers; or the
            prompts of all rows are in one fold.
        TypeError: `table` is no `Dataset`.
        ValueError: A parameter is out of range.
    """
    grid = _Grid(folds, position_bins, surprisal_bins, max_surprisal, smoothing)
    _check(table, teacher_logprob_floor)
    status, warnings = check_rows(table)
    if status == "altered":
        logger.warning(warnings[0])
    row_folds = (prompt_and_row_hashes(table)[0] % np.uint64(folds)).astype(np.int64)
    if len(present := np.unique(row_folds)) < 2:
        raise TableError(
            f"The prompts of all {len(table)} rows are in fold {present[0]} of {folds}, and each is corrected by "
            "those of other folds. Score rollouts of more prompts, hundreds at least."
        )

    def parts() -> Iterator[_Tokens]:
        return _read(table, row_folds, grid, teacher_logprob_floor)

    means_of_tokens, means_of_contexts = _fit(parts(), grid)
    chunks, totals, trained = [], np.zeros(4), 0
    for part in parts():
        bias = (means_of_tokens[part.token, part.fold] + means_of_contexts[part.context, part.fold]) / 2
        left = part.difference - bias
        values = np.stack([np.ones_like(left), part.difference, part.difference**2, left**2])
        totals += values @ part.weight
        trained += int(np.count_nonzero(part.weight))
        offsets = np.concatenate([[0], np.cumsum(part.sizes)]).astype(np.int32)
        chunks.append(pa.ListArray.from_arrays(offsets, pa.array((part.teacher - bias).astype(np.float32))))
    mean, square, unexplained = totals[1:] / totals[0]
    variance = square - mean**2
    fit = {
        **asdict(grid),
        "explained_variance": round(float(1 - unexplained / variance), 4) if variance > 0 else 0.0,
        "rows": len(table),
        "tokens": trained,
        "digest": rows_digest(table),
    }
    if fit["explained_variance"] < _LEAST_EXPLAINED:
        logger.warning(
            f"The recurring part explains {fit['explained_variance']:.1%} of the variance on rows that it was not "
            f"fitted on: hardly anything is corrected. {len(table)} rows may be too few, or the teacher writes as the "
            "student does."
        )
    replaced = [name for name in ("teacher_logprobs", *TOPK_COLUMNS) if name in table.column_names]
    result = table.remove_columns(replaced).add_column(
        RESIDUAL, pa.chunked_array(chunks), feature=List(Value("float32"))
    )
    attach_record(result, _record(table, result, fit, intact=status == "intact"))
    return result


def _check(table: Dataset, floor: float | None) -> None:
    """Raises unless a table can be residualized, see [`residualize_table`]."""
    refuse_no_dataset(table, "table")
    if RESIDUAL in table.column_names:
        raise TableError(f"The table has `{RESIDUAL}`: it is a residual already.")
    if "ref_logprobs" not in table.column_names:
        raise TableError(
            "The table has no column `ref_logprobs`, the log-probabilities of the student that sampled, beside which "
            "a teacher's scores are corrected. `collect_rollouts` writes it; for rollouts without it, score them with "
            "`score_rollouts(..., ref_model=STUDENT)`."
        )
    teachers = validate_table(table, teacher_logprob_floor=floor).teacher_fingerprints
    if len(teachers) > 1:
        raise TableError(
            f"The table was scored by {len(teachers)} teachers ({', '.join(teachers)}), and each has a recurring part "
            "of its own. Residualize the rows of each by themselves, and `concatenate_datasets` the results."
        )


def _read(table: Dataset, row_folds: np.ndarray, grid: _Grid, floor: float | None) -> Iterator[_Tokens]:
    """Reads the tokens of a valid table, batch by batch."""
    names = ("completion_ids", "teacher_logprobs", "ref_logprobs", "completion_mask")
    start = 0
    for batch in batches(table, [name for name in names if name in table.column_names], _BATCH_ROWS):
        sizes, token = flat_values("completion_ids", batch)
        teacher, ref = (flat_values(name, batch)[1].astype(np.float64) for name in names[1:3])
        if floor is not None:
            teacher[teacher == -np.inf] = floor
        row = np.repeat(np.arange(len(sizes)), sizes)
        mask = flat_values(names[3], batch)[1] if names[3] in batch.column_names else np.ones(len(row), bool)
        position = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        position_bin = position * grid.position_bins // sizes[row]
        surprisal = np.clip(-ref, 0, grid.max_surprisal) / grid.max_surprisal
        surprisal_bin = np.minimum((surprisal * grid.surprisal_bins).astype(np.int64), grid.surprisal_bins - 1)
        yield _Tokens(
            sizes=sizes,
            teacher=teacher,
            difference=teacher - ref,
            weight=mask / np.bincount(row, mask)[row],
            fold=row_folds[start : start + len(sizes)][row],
            token=token.astype(np.int64),
            context=position_bin * grid.surprisal_bins + surprisal_bin,
        )
        start += len(sizes)


def _fit(parts: Iterator[_Tokens], grid: _Grid) -> tuple[np.ndarray, np.ndarray]:
    """Computes the means of each token id and of each context for the tokens of a fold, `(groups, folds)` float64."""
    # Sums of the weights and of the weighted differences in each group and fold.
    sums = {"token": np.zeros((2, 0)), "context": np.zeros((2, 0))}
    counts = np.zeros(grid.folds)
    for part in parts:
        counts += np.bincount(part.fold[part.weight > 0], minlength=grid.folds)
        for name, total in sums.items():
            cell = getattr(part, name) * grid.folds + part.fold
            groups = max(int(getattr(part, name).max()) + 1, total.shape[1] // grid.folds)
            size = groups * grid.folds
            added = np.stack([np.bincount(cell, w, size) for w in (part.weight, part.weight * part.difference)])
            added[:, : total.shape[1]] += total
            sums[name] = added
    # Sums of all folds but one, which has no part in them, not even by rounding.
    others = 1.0 - np.eye(grid.folds)
    means = []
    for total in sums.values():
        weights, weighted = total.reshape(2, -1, grid.folds) @ others
        mean = weighted.sum(0) / weights.sum(0)
        prior = grid.smoothing * weights.sum(0) / (counts @ others)
        means.append((weighted + prior * mean) / (weights + prior))
    return means[0], means[1]


def _record(table: Dataset, result: Dataset, fit: dict[str, Any], intact: bool) -> dict[str, Any]:
    """Returns the record of a residual table: that of the table, the fit, and the digest of the new rows."""
    record = {key: value for key, value in record_of(table).items() if key not in ("columns", "digests")}
    record["residual"] = [fit]
    if intact:  # a digest of rows that were altered before would say that they are those that were scored
        columns = digest_columns(result.column_names)
        record |= {"columns": columns, "digests": [{"rows": len(result), "digest": rows_digest(result, columns)}]}
    return record
