"""`residualize_table` against a plain implementation with loops and dictionaries, and what it refuses."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from tiny import make_model, make_rollouts, without_topk

from trl_lopd import (
    TableError,
    load_table,
    read_dataset_card,
    residualize_table,
    score_rollouts,
    stamp_dataset_card,
    validate_table,
)
from trl_lopd.identity.cards import record_of
from trl_lopd.identity.consistency import check_rows
from trl_lopd.table.schema import prompt_and_row_hashes, rows_digest, table_features

GRID = {"folds": 3, "position_bins": 4, "surprisal_bins": 5, "max_surprisal": 6.0, "smoothing": 7.0}


def make_table(rows: int = 60, seed: int = 0, mask: bool = False) -> Dataset:
    """Ragged rows, several of a prompt, with token ids that are frequent, rare, or in one row alone."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 50, rng.integers(1, 6)).tolist() for _ in range(rows // 3)]
    columns = defaultdict(list)
    for row in range(rows):
        size = int(rng.integers(1, 30))
        ids = np.minimum(rng.geometric(0.2, size), 40)
        if row % 7 == 0:
            ids[0] = 1000 + row
        columns["prompt_ids"].append(prompts[row % len(prompts)])
        columns["completion_ids"].append(ids.tolist())
        columns["teacher_logprobs"].append((-rng.exponential(3.0, size)).tolist())
        columns["ref_logprobs"].append((-rng.exponential(2.0, size)).tolist())
        columns["teacher_fingerprint"].append("t@1-0123456789ab-01234567-01234567")
        if mask:
            trained = rng.random(size) < 0.6
            trained[0] = True
            columns["completion_mask"].append(trained.tolist())
    return Dataset.from_dict(dict(columns), features=table_features(ref_logprobs=True, completion_mask=mask))


def plain_residuals(table: Dataset, folds, position_bins, surprisal_bins, max_surprisal, smoothing):
    """The residual of each token, row by row, and the share of the variance that is explained."""
    fold_of = (prompt_and_row_hashes(table)[0] % np.uint64(folds)).tolist()
    tokens = []
    for row, fold in zip(table, fold_of, strict=True):
        mask = row.get("completion_mask") or [True] * len(row["completion_ids"])
        for t, (token, teacher, ref) in enumerate(
            zip(row["completion_ids"], row["teacher_logprobs"], row["ref_logprobs"], strict=True)
        ):
            place = math.floor(t / len(row["completion_ids"]) * position_bins)
            surprisal = min(math.floor(min(-ref, max_surprisal) / max_surprisal * surprisal_bins), surprisal_bins - 1)
            weight = 1 / sum(mask) if mask[t] else 0.0
            tokens.append((fold, token, (place, surprisal), weight, teacher - ref, teacher))
    residuals, left, right = [], 0.0, 0.0
    for fold in range(folds):
        fitted = [entry for entry in tokens if entry[0] != fold and entry[3] > 0]
        total = sum(entry[3] for entry in fitted)
        mean = sum(entry[3] * entry[4] for entry in fitted) / total
        added = smoothing * total / len(fitted)
        means = {}
        for key in (1, 2):
            groups = defaultdict(list)
            for entry in fitted:
                groups[entry[key]].append(entry)
            means[key] = {
                group: (added * mean + sum(e[3] * e[4] for e in entries)) / (added + sum(e[3] for e in entries))
                for group, entries in groups.items()
            }
        for i, entry in enumerate(tokens):
            if entry[0] == fold:
                bias = (means[1].get(entry[1], mean) + means[2].get(entry[2], mean)) / 2
                residuals.append((i, entry[5] - bias))
                left += entry[3] * (entry[4] - bias) ** 2
    weights = sum(entry[3] for entry in tokens)
    mean = sum(entry[3] * entry[4] for entry in tokens) / weights
    right = sum(entry[3] * (entry[4] - mean) ** 2 for entry in tokens)
    return np.array([value for _, value in sorted(residuals)]), 1 - left / right


def flat(table: Dataset, column: str = "residual_logprobs") -> np.ndarray:
    return np.concatenate([np.array(row, np.float64) for row in table[column]])


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_residuals_are_those_of_a_plain_implementation(seed, mask):
    table = make_table(seed=seed, mask=mask)
    result = residualize_table(table, **GRID)
    expected, explained = plain_residuals(table, **GRID)
    assert np.abs(expected - flat(table, "teacher_logprobs")).max() > 0.1
    np.testing.assert_allclose(flat(result), expected, rtol=1e-5, atol=1e-5)
    (fit,) = record_of(result)["residual"]
    assert fit["explained_variance"] == pytest.approx(explained, abs=1e-4)
    trained = table["completion_mask"] if mask else table["completion_ids"]
    assert fit["tokens"] == sum(sum(row) if mask else len(row) for row in trained)


def test_a_row_is_read_in_whatever_batch_it_is(monkeypatch):
    table = make_table()
    whole = residualize_table(table)
    monkeypatch.setattr("trl_lopd.generation.residual._BATCH_ROWS", 7)
    np.testing.assert_allclose(flat(residualize_table(table)), flat(whole), rtol=1e-6)


def test_the_order_of_rows_decides_nothing():
    table = make_table()
    order = np.random.default_rng(1).permutation(len(table))
    shuffled = residualize_table(table.select(order))
    np.testing.assert_allclose(flat(shuffled), flat(residualize_table(table).select(order)), rtol=1e-6)
    assert shuffled["completion_ids"][:] == table.select(order)["completion_ids"][:]


def test_no_token_is_corrected_by_scores_of_its_own_prompt():
    table = make_table()
    own = table["prompt_ids"][4]

    def change(row):
        factor = 5 if row["prompt_ids"] == own else 1
        return {"teacher_logprobs": [factor * value for value in row["teacher_logprobs"]]}

    def biases(of):
        pairs = zip(of["teacher_logprobs"], residualize_table(of)["residual_logprobs"], strict=True)
        return [np.subtract(*pair) for pair in pairs]

    bias = [biases(of) for of in (table, table.map(change))]
    answers = [row for row, prompt in enumerate(table["prompt_ids"]) if prompt == own]
    assert len(answers) == 3
    for row in answers:
        # In float32, of which more are lost for larger scores.
        np.testing.assert_allclose(bias[0][row], bias[1][row], atol=1e-5)
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(*bias, strict=True))


def test_a_recurring_part_is_taken_out_and_the_rest_is_kept():
    """A teacher that likes each token by a constant of its own, and besides knows something of one row."""
    table = make_table(600)
    rng = np.random.default_rng(5)
    taste = -rng.exponential(2.0, 2000)

    def scores(row, i):
        liked = np.array(row["ref_logprobs"]) - 1 + taste[row["completion_ids"]]
        return {"teacher_logprobs": liked - 3.0 * (i == 10)}

    table = table.map(scores, with_indices=True)
    result = residualize_table(table, smoothing=1e-6, position_bins=1, surprisal_bins=1)
    left = flat(result) - flat(table, "ref_logprobs")
    raw = flat(table, "teacher_logprobs") - flat(table, "ref_logprobs")
    # Half of the deviation from the mean, as the context says nothing here.
    assert record_of(result)["residual"][0]["explained_variance"] == pytest.approx(0.75, abs=0.1)
    assert left.std() < 0.65 * raw.std()
    known = np.subtract(result["residual_logprobs"][10], table["ref_logprobs"][10])
    assert known.mean() < left.mean() - 2


def test_a_fit_that_explains_nothing_is_said(caplog):
    """The difference is noise, which nothing predicts on other rows."""
    table, rng = make_table(60), np.random.default_rng(7)
    noisy = table.map(
        lambda row: {"teacher_logprobs": np.array(row["ref_logprobs"]) - rng.random(len(row["ref_logprobs"]))}
    )
    residualize_table(noisy)
    assert "hardly anything is corrected. 60 rows may be too few" in caplog.text


def test_the_table_and_its_record(tmp_path, table):
    result = residualize_table(table, folds=3)
    kept = [name for name in table.column_names if not name.startswith("teacher_") or name == "teacher_fingerprint"]
    assert set(result.column_names) == {*kept, "residual_logprobs"} and len(result) == len(table)
    assert result["teacher_fingerprint"][:] == table["teacher_fingerprint"][:]
    assert result.features["residual_logprobs"] == table.features["teacher_logprobs"]
    assert validate_table(result).top_k == 0
    (fit,) = record_of(result)["residual"]
    assert fit["digest"] == rows_digest(table) and (fit["folds"], fit["rows"]) == (3, len(table))
    assert record_of(result)["teachers"] == record_of(table)["teachers"] and check_rows(result)[0] == "intact"

    # On the Hub, or in a directory of its own.
    result.to_parquet(tmp_path / "train.parquet")
    stamp_dataset_card(tmp_path, result)
    assert read_dataset_card(tmp_path)["residual"] == [fit]
    loaded = load_table(tmp_path, split="train")
    assert record_of(loaded)["residual"] == [fit] and check_rows(loaded)[0] == "intact"
    changed = loaded.map(lambda row: {"residual_logprobs": [v - 1 for v in row["residual_logprobs"]]})
    assert check_rows(changed)[0] == "altered"
    stamp_dataset_card(tmp_path, table)
    assert "residual" not in read_dataset_card(tmp_path)


def test_a_digest_does_not_cover_up_that_rows_were_altered_before(table, caplog):
    altered = table.map(lambda row: {"ref_logprobs": [value - 0.5 for value in row["ref_logprobs"]]})
    result = residualize_table(altered)
    assert "values changed in" in caplog.text and check_rows(result)[0] == "unverified"


def test_tables_of_several_teachers_are_residualized_one_by_one(tmp_path, table, student_dir, tokenizer):
    other = tmp_path / "other"
    make_model(seed=7).save_pretrained(other)
    tokenizer.save_pretrained(other)
    second = score_rollouts(make_rollouts(24, seed=1), str(other), top_k=4, ref_model=str(student_dir))
    both = concatenate_datasets([table, second])
    with pytest.raises(TableError, match="scored by 2 teachers .* Residualize the rows of each"):
        residualize_table(both)
    joined = concatenate_datasets([residualize_table(rows) for rows in (table, second)])
    assert validate_table(joined).rows == 48 and len(record_of(joined)["residual"]) == 2
    assert check_rows(joined)[0] == "intact"


def test_a_residual_is_not_joined_with_scores(table):
    for of in (table, without_topk(table)):
        joined = concatenate_datasets([residualize_table(table), of])
        with pytest.raises(TableError, match="`residual_logprobs` and `teacher_logprobs`.* joined"):
            validate_table(joined)


def test_a_score_of_minus_infinity_needs_a_floor():
    rows = make_table().to_list()
    rows[3]["teacher_logprobs"][0] = -math.inf
    table = Dataset.from_list(rows, features=make_table().features)
    with pytest.raises(TableError, match="Row 3, column `teacher_logprobs`, token 0: -inf.*teacher_logprob_floor"):
        residualize_table(table)
    rows[3]["teacher_logprobs"][0] = -20.0
    floored = Dataset.from_list(rows, features=table.features)
    assert np.array_equal(
        flat(residualize_table(table, teacher_logprob_floor=-20.0)), flat(residualize_table(floored))
    )


def test_what_is_refused(table):
    with pytest.raises(TableError, match="no column `ref_logprobs`.*ref_model=STUDENT"):
        residualize_table(table.remove_columns("ref_logprobs"))
    with pytest.raises(TableError, match="it is a residual already"):
        residualize_table(residualize_table(table))
    with pytest.raises(TableError, match="all 3 rows are in fold .* of 5"):
        residualize_table(table.select([0, 0, 0]))
    with pytest.raises(TypeError, match="a dict of splits"):
        residualize_table({"train": table})
    for wrong in (
        {"folds": 1},
        {"position_bins": 0},
        {"surprisal_bins": 2.5},
        {"smoothing": 0},
        {"max_surprisal": -1},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            residualize_table(table, **wrong)


def test_a_residual_is_validated(table):
    rows = residualize_table(table).to_list()
    rows[2]["residual_logprobs"][0] = math.nan
    with pytest.raises(TableError, match="Row 2, column `residual_logprobs`, token 0: nan"):
        validate_table(Dataset.from_list(rows))
    rows[2]["residual_logprobs"][0] = None
    with pytest.raises(TableError, match="Row 2, column `residual_logprobs`: a null where a value is needed"):
        validate_table(Dataset.from_list(rows))
    rows[2]["residual_logprobs"][0] = 0.5
    validate_table(Dataset.from_list(rows))  # no log-probability
    rows[2]["residual_logprobs"] += [0.0]
    with pytest.raises(TableError, match="Row 2, column `residual_logprobs`: .* entries for"):
        validate_table(Dataset.from_list(rows))


def test_a_residual_is_not_scored_again_beside_it(table, teacher_dir):
    rows = residualize_table(table).remove_columns("teacher_fingerprint")
    with pytest.raises(TableError, match="have the column 'residual_logprobs' already"):
        score_rollouts(rows, str(teacher_dir))
