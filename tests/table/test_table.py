from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ranks
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    LargeList,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from hub import Hub

from trl_lopd.generation.scoring import with_scores
from trl_lopd.generation.teachers import Scores
from trl_lopd.table import schema
from trl_lopd.table.schema import (
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    TableError,
    TableRows,
    TableSummary,
    content_digest,
    lengths,
    rows_digest,
    table_features,
    validate_rows,
    validate_table,
    vocab_limits,
)
from trl_lopd.table.store import ShardStore
from trl_lopd.training.collator import OfflineOPDCollator

FEATURES = table_features(top_k=2, ref_logprobs=True, completion_mask=True)
# Of a table that has all of them; tests/generation/test_residual.py has residual tables.
TOKEN_COLUMNS = [name for name in schema.TOKEN_COLUMNS if name != schema.RESIDUAL]
# What other tools write, and what `score_rollouts` once did.
VARIABLE = Features(
    {**FEATURES, "teacher_topk_ids": List(List(Value("int32"))), "teacher_topk_logprobs": List(List(Value("float16")))}
)
LARGE = Features(
    {
        name: LargeList(LargeList(feature.feature.feature))
        if name.startswith("teacher_topk")
        else (LargeList(feature.feature) if isinstance(feature, List) else Value("large_string"))
        for name, feature in FEATURES.items()
    }
)
WIDE = Features(
    {
        **FEATURES,
        "completion_ids": List(Value("int64")),
        "teacher_topk_ids": List(List(Value("int64"), length=2)),
        "teacher_topk_logprobs": LargeList(List(Value("float64"), length=2)),
    }
)
INF, NAN = float("inf"), float("nan")
RESCORE = "Score the row again with `score_rollouts`, or drop it."


def make_row(i: int) -> dict:
    """Row `i`, `i % 3 + 1` completion tokens long; the sampled token is the second of the top-k."""
    n = i % 3 + 1
    return {
        "prompt_ids": list(range(i % 2 + 1)),
        "completion_ids": [10 + i] * n,
        "teacher_logprobs": [-1.1] * n,
        "teacher_fingerprint": "teacher-a" if i % 2 else "teacher-b",
        "ref_logprobs": [-2.0] * n,
        "completion_mask": [True] + [False] * (n - 1),
        "teacher_topk_ids": [[5, 10 + i]] * n,
        "teacher_topk_logprobs": [[-0.7, -1.1]] * n,
    }


def make_rows(count: int = 6) -> list[dict]:
    return [make_row(i) for i in range(count)]


def make_table(rows: list[dict], features: Features = FEATURES) -> Dataset:
    return Dataset.from_list(rows, features=features)


def make_top_k_table(ids: list[list[int]], logprobs: list[list[float]]) -> Dataset:
    """One row whose sampled tokens, all 0, are scored -9."""
    n = len(ids)
    row = {
        "prompt_ids": [1],
        "completion_ids": [0] * n,
        "teacher_logprobs": [-9.0] * n,
        "teacher_fingerprint": "teacher-a",
        "teacher_topk_ids": ids,
        "teacher_topk_logprobs": logprobs,
    }
    return make_table([row], table_features(top_k=len(ids[0])))


def refusal(dataset: Dataset, *args, **kwargs) -> str:
    with pytest.raises(TableError) as raised:
        validate_table(dataset, *args, **kwargs)
    return str(raised.value)


def refusal_of_rows(rows: pa.Table) -> str:
    with pytest.raises(TableError) as raised:
        validate_rows(rows)
    return str(raised.value)


def without(dataset: Dataset, *names: str) -> Dataset:
    return dataset.remove_columns(list(names))


# Good tables


def test_summary_of_a_table_with_all_columns():
    expected = TableSummary(
        rows=6,
        completion_tokens=12,
        trainable_tokens=6,
        top_k=2,
        floored=0,
        teacher_fingerprints={"teacher-a": 3, "teacher-b": 3},
    )
    for batch_rows in (1, 4, 100):
        assert validate_table(make_table(make_rows()), batch_rows=batch_rows) == expected


def test_summary_of_a_table_with_the_required_columns_only():
    summary = validate_table(make_table(make_rows()).select_columns(list(REQUIRED_COLUMNS)))
    assert (summary.trainable_tokens, summary.top_k) == (12, 0)


def test_other_columns_are_ignored():
    rows = [{**row, "note": None} for row in make_rows()]
    assert validate_table(make_table(rows, Features({**FEATURES, "note": Value("string")}))).rows == 6


@pytest.mark.parametrize(
    ("change", "indices"),
    [
        (lambda table: table.shuffle(seed=3), None),
        (lambda table: table.select([5, 2, 2]), [5, 2, 2]),
        (lambda table: table.select(range(2, 5)), [2, 3, 4]),
        (lambda table: table.filter(lambda row: len(row["completion_ids"]) > 1), [1, 2, 4, 5]),
        (lambda table: concatenate_datasets([table.select([4]), table]), [4, 0, 1, 2, 3, 4, 5]),
        (lambda table: table.with_format("numpy", columns=["prompt_ids"]), [0, 1, 2, 3, 4, 5]),
    ],
    ids=["shuffle", "select", "slice", "filter", "concatenate", "format"],
)
def test_rearranged_tables(change, indices):
    changed = change(make_table(make_rows()))
    tokens = [ids[0] for ids in changed.with_format(None)["completion_ids"]]
    assert indices is None or tokens == [10 + i for i in indices]
    summary = validate_table(changed, batch_rows=2)
    assert summary.rows == len(tokens)
    assert summary.completion_tokens == sum((token - 10) % 3 + 1 for token in tokens)


def test_parquet_and_disk_round_trips_keep_types(tmp_path):
    table = make_table(make_rows())
    expected = validate_table(table)
    table.to_parquet(tmp_path / "table.parquet")
    table.save_to_disk(tmp_path / "table")
    from_parquet = Dataset.from_parquet(str(tmp_path / "table.parquet"), cache_dir=str(tmp_path / "cache"))
    for loaded in (from_parquet, load_from_disk(tmp_path / "table")):
        assert loaded.features == FEATURES
        assert loaded.data.schema.field("teacher_topk_logprobs").type == pa.list_(pa.list_(pa.float16(), 2))
        assert validate_table(loaded) == expected


def test_large_lists():
    table = make_table(make_rows(), LARGE)
    assert pa.types.is_large_list(table.data.schema.field("completion_ids").type)
    assert validate_table(table, batch_rows=4) == validate_table(make_table(make_rows()))
    assert lengths(table)[1].tolist() == [1, 2, 3, 1, 2, 3]


def test_wider_types_are_accepted():
    rows = [{name: row[name] for name in REQUIRED_COLUMNS} for row in make_rows()]
    table = Dataset.from_list(rows)
    assert table.features["completion_ids"] == List(Value("int64"))
    assert validate_table(table).completion_tokens == 12


def test_features_hold_the_columns_asked_for():
    assert tuple(table_features()) == REQUIRED_COLUMNS
    assert set(FEATURES) == {*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS}
    assert set(FEATURES) - set(TOKEN_COLUMNS) == {"prompt_ids", "teacher_fingerprint"}
    assert FEATURES["teacher_topk_logprobs"] == List(List(Value("float16"), length=2))


def test_lengths():
    table = make_table(make_rows(2500))
    order = np.random.default_rng(0).permutation(2500)
    prompt, completion = lengths(table.select(order))
    assert prompt.dtype == completion.dtype == np.int64
    assert prompt.tolist() == [i % 2 + 1 for i in order]
    assert completion.tolist() == [i % 3 + 1 for i in order]
    assert [part.shape for part in lengths(table.select([]))] == [(0,), (0,)]


def test_import_needs_neither_torch_nor_transformers():
    code = "import sys, trl_lopd.table.schema; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Structure


@pytest.mark.parametrize("name", REQUIRED_COLUMNS)
def test_missing_column(name):
    message = refusal(without(make_table(make_rows()), name))
    remedy = "Make the table with `score_rollouts`, which writes it."
    if name in ("prompt_ids", "completion_ids"):
        remedy = "Make rollouts with `collect_rollouts`, and the table from them with `score_rollouts`."
    assert message == f"Missing column `{name}`. {remedy}"


@pytest.mark.parametrize(
    ("absent", "present"),
    [("teacher_topk_ids", "teacher_topk_logprobs"), ("teacher_topk_logprobs", "teacher_topk_ids")],
)
def test_half_a_top_k(absent, present):
    message = refusal(without(make_table(make_rows()), absent))
    assert message.startswith(f"Missing column `{absent}`, which `{present}` needs. Score with `score_rollouts`")
    assert message.endswith(f"or remove `{present}`.")


@pytest.mark.parametrize(
    ("name", "feature", "value", "found", "needed"),
    [
        ("prompt_ids", List(Value("float32")), [1.0], "list<item: float>", "list of integers"),
        ("completion_ids", List(Value("string")), ["a"], "list<item: string>", "list of integers"),
        ("completion_ids", Value("int32"), 1, "int32", "list of integers"),
        ("teacher_logprobs", List(Value("int32")), [-1], "list<item: int32>", "list of floats"),
        ("teacher_logprobs", List(List(Value("float32"))), [[-1.0]], "list<item: list", "list of floats"),
        ("ref_logprobs", List(Value("int64")), [-1], "list<item: int64>", "list of floats"),
        ("completion_mask", List(Value("int8")), [1], "list<item: int8>", "list of booleans"),
        ("teacher_fingerprint", Value("int64"), 7, "int64", "string"),
        ("teacher_topk_ids", List(List(Value("float32"))), [[1.0]], "list<item: list", "list of list of integers"),
        ("teacher_topk_ids", List(Value("int32")), [1], "list<item: int32>", "list of list of integers"),
        ("teacher_topk_logprobs", List(List(Value("int32"))), [[-1]], "list<item: list", "list of list of floats"),
    ],
)
def test_wrong_type(name, feature, value, found, needed):
    message = refusal(make_table([{**make_row(0), name: value}], Features({**FEATURES, name: feature})))
    assert message.startswith(f"Column `{name}`: type {found}")
    castable = name in ("prompt_ids", "completion_mask") or found == "list<item: list" and needed.endswith("integers")
    remedy = "Cast it to its type in `table_features`, or make" if castable else "Make"
    assert re.search(rf", where {needed} is needed\. {remedy} it with `(score|collect)_rollouts`", message)


def test_empty_table():
    message = refusal(make_table(make_rows()).select([]))
    assert message.startswith("The table has no rows. Check the filter or split that made it")


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, None) for name in FEATURES]
    + [(name, [None, *make_row(2)[name][1:]]) for name in TOKEN_COLUMNS]
    + [("prompt_ids", [1, None])]
    + [(name, [*make_row(2)[name][:2], [None, make_row(2)[name][2][1]]]) for name in FEATURES if "topk" in name],
)
@pytest.mark.parametrize("features", [FEATURES, VARIABLE], ids=["fixed", "variable"])
def test_null(name, value, features):
    rows = make_rows()
    rows[2][name] = value
    table = make_table(rows, features)
    for part in (table, table.select(range(1, 6)), table.data.table.slice(1)):
        message = refusal(part) if isinstance(part, Dataset) else refusal_of_rows(part)
        row = 2 if part is table else 1
        remedy = "Drop the row." if name in ("prompt_ids", "completion_ids") else RESCORE
        assert message == f"Row {row}, column `{name}`: a null where a value is needed. {remedy}"


def test_empty_prompt():
    rows = make_rows()
    rows[4]["prompt_ids"] = []
    message = refusal(make_table(rows))
    assert message.startswith("Row 4, column `prompt_ids`: 0 tokens, so the first completion token has no context.")
    assert "Begin the prompt with a token" in message and "drop the row" in message


def test_empty_completion():
    rows = make_rows()
    rows[3].update({name: [] for name in TOKEN_COLUMNS})
    message = refusal(make_table(rows))
    assert message == "Row 3, column `completion_ids`: 0 tokens, so there is nothing to learn from. Drop the row."


@pytest.mark.parametrize("name", [name for name in TOKEN_COLUMNS if name != "completion_ids"])
@pytest.mark.parametrize("entries", [0, 1, 3])
def test_length_differs_from_the_completion(name, entries):
    rows = make_rows()
    rows[4][name] = (rows[4][name] * 2)[:entries]
    message = refusal(make_table(rows))
    assert message == f"Row 4, column `{name}`: {entries} entries for 2 tokens in `completion_ids`. {RESCORE}"


@pytest.mark.parametrize("name", ["teacher_topk_ids", "teacher_topk_logprobs"])
@pytest.mark.parametrize("batch_rows", [1, 100])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_one_k_for_the_whole_table(name, batch_rows, k):
    rows = make_rows()
    rows[4][name] = [rows[4][name][0], (rows[4][name][1] * 2)[:k]]
    message = refusal(make_table(rows, VARIABLE), batch_rows=batch_rows)
    assert message.startswith(f"Row 4, column `{name}`, token 1: {k} top-k values, where 2 are needed.")
    assert "Score all rows with `score_rollouts` and one k of at least 1." in message


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_one_k_in_both_columns_of_the_whole_table(batch_rows):
    rows = make_rows()
    rows[3].update({"teacher_topk_ids": [[5, 13, 6]], "teacher_topk_logprobs": [[-0.7, -1.1, -3.0]]})
    message = refusal(make_table(rows, VARIABLE), batch_rows=batch_rows)
    assert message.startswith("Row 3, column `teacher_topk_ids`, token 0: 3 top-k values, where 2 are needed.")


def test_one_k_in_both_columns_of_fixed_size():
    features = Features({**FEATURES, "teacher_topk_logprobs": List(List(Value("float16"), length=3))})
    rows = [{**row, "teacher_topk_logprobs": [[-0.7, -1.1, -3.0]] * len(row["completion_ids"])} for row in make_rows()]
    message = refusal(make_table(rows, features))
    assert message.startswith("Row 0, column `teacher_topk_logprobs`, token 0: 3 top-k values, where 2 are needed.")


def test_k_of_zero():
    empty = {"teacher_topk_ids": [[]], "teacher_topk_logprobs": [[]]}
    message = refusal(make_table([{**make_row(0), **empty}], VARIABLE))
    assert message.startswith("Row 0, column `teacher_topk_ids`, token 0: 0 top-k values, where 1 are needed.")


def test_structure_is_reported_before_values():
    rows = make_rows()
    rows[1]["teacher_logprobs"][0] = NAN
    assert refusal(make_table(rows)).startswith("Row 1, column `teacher_logprobs`")
    rows[4]["ref_logprobs"] = [-1.0]
    assert refusal(make_table(rows)).startswith("Row 4, column `ref_logprobs`")


# Values


def put(rows: list[dict], row: int, name: str, token: int, value) -> None:
    """Sets one entry; of a top-k column, the first of the k, which is not the sampled token."""
    entries = rows[row][name] = list(rows[row][name])
    entries[token] = [value, *entries[token][1:]] if "topk" in name else value


@pytest.mark.parametrize("name", ["prompt_ids", "completion_ids", "teacher_topk_ids"])
def test_negative_id(name):
    rows = make_rows()
    put(rows, 5, name, 1, -7)
    message = refusal(make_table(rows))
    assert message.startswith(f"Row 5, column `{name}`, token 1: -7, but a token id is 0 or more.")
    assert "Make the table with the tokenizer and model you train, or drop the row." in message


def fake_tokenizer(size: int) -> SimpleNamespace:
    """Its vocabulary has a gap: the largest id counts, not how many there are."""
    return SimpleNamespace(get_vocab=lambda: {"first": 0, "last": size - 1})


def fake_config(size: int) -> SimpleNamespace:
    """A multimodal configuration: the vocabulary is the text model's."""
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=size))


@pytest.mark.parametrize(
    ("name", "tokenizer_size", "model_size", "limit"),
    [
        ("prompt_ids", 20, None, 20),
        ("prompt_ids", None, 30, 30),
        ("completion_ids", 20, 30, 20),
        ("completion_ids", 30, 20, 20),
    ],
)
def test_id_out_of_vocabulary(name, tokenizer_size, model_size, limit):
    tokenizer = tokenizer_size and fake_tokenizer(tokenizer_size)
    model_config = model_size and fake_config(model_size)
    rows = make_rows()
    if name == "completion_ids":  # a token outside the top-k
        put(rows, 5, "teacher_logprobs", 1, -9.0)
    put(rows, 5, name, 1, limit - 1)
    assert validate_table(make_table(rows), tokenizer, model_config).rows == 6
    put(rows, 5, name, 1, limit)
    message = refusal(make_table(rows), tokenizer, model_config)
    assert message.startswith(f"Row 5, column `{name}`, token 1: {limit}, but token ids are 0 to {limit - 1}.")
    assert "Make the table with the tokenizer and model you train" in message


@pytest.mark.parametrize(("tokenizer_size", "model_size", "limit"), [(20, None, 20), (20, 30, 30), (None, 30, 30)])
def test_top_k_tokens_that_the_student_lacks_are_counted(tokenizer_size, model_size, limit):
    tokenizer = tokenizer_size and fake_tokenizer(tokenizer_size)
    model_config = model_size and fake_config(model_size)
    rows = make_rows()
    put(rows, 5, "teacher_topk_ids", 1, limit - 1)
    assert validate_table(make_table(rows), tokenizer, model_config).foreign_topk == 0
    put(rows, 5, "teacher_topk_ids", 1, limit)
    put(rows, 2, "teacher_topk_ids", 0, limit + 7)
    assert validate_table(make_table(rows), tokenizer, model_config, batch_rows=2).foreign_topk == 2
    assert validate_table(make_table(rows)).foreign_topk == 0


def test_vocab_limits():
    assert vocab_limits() == (None, None)
    assert vocab_limits(fake_tokenizer(20), fake_config(30)) == (20, 30)


@pytest.mark.parametrize("name", ["teacher_logprobs", "ref_logprobs", "teacher_topk_logprobs"])
@pytest.mark.parametrize(
    ("value", "why", "remedy"),
    [
        (NAN, "nan, but a log-probability is a number", RESCORE),
        (INF, "inf, but a log-probability is at most 0", "natural-log probabilities at temperature 1"),
        (0.5, "0.5, but a log-probability is at most 0", "natural-log probabilities at temperature 1"),
        (-INF, "-inf, but the ", None),
    ],
)
def test_broken_logprob(name, value, why, remedy):
    if value == -INF:
        remedy = RESCORE if name == "ref_logprobs" else "Set `teacher_logprob_floor`"
    rows = make_rows()
    put(rows, 4, name, 1, value)
    message = refusal(make_table(rows))
    assert message.startswith(f"Row 4, column `{name}`, token 1: {why}")
    assert remedy in message


def test_logprob_rounded_above_zero():
    rows = [{name: row[name] for name in REQUIRED_COLUMNS} for row in make_rows()]
    rows[2]["teacher_logprobs"][1] = 9e-4
    assert validate_table(make_table(rows, table_features())).rows == 6
    rows[2]["teacher_logprobs"][1] = 1.1e-3
    assert refusal(make_table(rows, table_features())).startswith("Row 2, column `teacher_logprobs`, token 1: 0.0011")


def test_floor_admits_and_counts_minus_inf():
    rows = make_rows()
    put(rows, 4, "teacher_topk_logprobs", 0, -INF)
    # The sampled token of row 5 is the second of its top-k: both scores of it are -inf, and agree.
    rows[5]["teacher_logprobs"][2] = -INF
    rows[5]["teacher_topk_logprobs"] = [*rows[5]["teacher_topk_logprobs"][:2], [-0.7, -INF]]
    for batch_rows in (1, 100):
        assert validate_table(make_table(rows), teacher_logprob_floor=-20.0, batch_rows=batch_rows).floored == 3
    assert refusal(make_table(rows)).startswith("Row 5, column `teacher_logprobs`, token 2: -inf")


def test_floor_does_not_admit_minus_inf_of_the_reference():
    rows = make_rows()
    put(rows, 4, "ref_logprobs", 1, -INF)
    message = refusal(make_table(rows), teacher_logprob_floor=-20.0)
    assert message.startswith("Row 4, column `ref_logprobs`, token 1: -inf, but the reference model gave")


@pytest.mark.parametrize("floor", [0.0, 5.0, -INF, NAN])
def test_floor_is_negative(floor):
    with pytest.raises(ValueError, match="teacher_logprob_floor must be a finite negative number, got"):
        validate_table(make_table(make_rows()), teacher_logprob_floor=floor)


def test_mask_without_a_token_to_train_on():
    rows = make_rows()
    rows[4]["completion_mask"] = [False, False]
    message = refusal(make_table(rows))
    assert message.startswith("Row 4, column `completion_mask`: all 2 entries are False. Drop rows")


def test_empty_fingerprint():
    rows = make_rows()
    rows[4]["teacher_fingerprint"] = ""
    message = refusal(make_table(rows))
    assert message == f"Row 4, column `teacher_fingerprint`: '' does not say which teacher scored the row. {RESCORE}"


# Top-k


def test_top_k_ids_are_distinct():
    rows = make_rows()
    put(rows, 4, "teacher_topk_ids", 1, 14)
    message = refusal(make_table(rows))
    assert message.startswith("Row 4, column `teacher_topk_ids`, token 1: token id 14 twice")
    assert RESCORE in message


def test_float16_rounding_of_a_uniform_top_k_is_accepted():
    for k in range(2, 129):
        logprob = float(np.float16(-np.log(k)))
        table = make_top_k_table([list(range(1, k + 1))], [[logprob] * k])
        assert validate_table(table).top_k == k
    stored = np.arange(2, 129) * np.exp(np.float16(-np.log(np.arange(2, 129))).astype(np.float64))
    # The tolerance alone would have refused some of them.
    assert stored.max() > 1.001


@pytest.mark.parametrize("k", [2, 64])
@pytest.mark.parametrize(("total", "accepted"), [(1.0, True), (1.01, False)])
def test_total_probability(k, total, accepted):
    good = [np.log(0.5 / k)] * k
    table = make_top_k_table([list(range(1, k + 1))] * 2, [good, [np.log(total / k)] * k])
    if accepted:
        assert validate_table(table).top_k == k
        return
    message = refusal(table)
    assert message.startswith("Row 0, column `teacher_topk_logprobs`, token 1: the top-k probabilities sum to 1.0")
    assert "over the full vocabulary at temperature 1" in message


def test_total_probability_with_minus_inf():
    table = make_top_k_table([[1, 2, 3]], [[np.log(0.6), np.log(0.6), -INF]])
    message = refusal(table, teacher_logprob_floor=-20.0)
    assert message.startswith("Row 0, column `teacher_topk_logprobs`, token 0: the top-k probabilities sum to 1.")


def test_top_k_agrees_with_the_sampled_score():
    stored = np.float16(-1.1)
    ulp = np.spacing(np.abs(stored))
    for score, accepted in [(stored, True), (stored + ulp, True), (stored - ulp, True), (stored - 2 * ulp, False)]:
        rows = make_rows()
        rows[4]["teacher_logprobs"][1] = float(score)
        if accepted:
            assert validate_table(make_table(rows)).rows == 6
            continue
        message = refusal(make_table(rows))
        assert message.startswith("Row 4, column `teacher_topk_logprobs`, token 1: -1.1 for the sampled token,")
        assert "but `teacher_logprobs` has -1.1015625. " + RESCORE in message


@pytest.mark.parametrize(("sampled", "stored"), [(-INF, -1.1), (-1.1, -INF)])
def test_minus_inf_agrees_with_minus_inf_only(sampled, stored):
    rows = make_rows()
    rows[4]["teacher_logprobs"][1] = sampled
    rows[4]["teacher_topk_logprobs"] = [[-0.7, -1.1], [-0.7, stored]]
    message = refusal(make_table(rows), teacher_logprob_floor=-20.0)
    assert message.startswith("Row 4, column `teacher_topk_logprobs`, token 1: -")


def test_top_k_near_certainty_may_differ_by_the_noise_of_float32():
    """float16 resolves -0.0002 to 1e-7, finer than two ways of summing a softmax agree."""
    rows = make_rows()
    rows[4]["teacher_topk_logprobs"] = [[-0.7, -1.1], [-0.000227, -9.0]]
    rows[4]["teacher_topk_ids"][1] = [rows[4]["completion_ids"][1], 17]
    rows[4]["teacher_logprobs"][1] = -0.000235
    assert validate_table(make_table(rows)).rows == 6


def test_sampled_token_outside_the_top_k():
    rows = make_rows()
    rows[4]["teacher_topk_ids"] = [[5, 6], [5, 6]]
    rows[4]["teacher_logprobs"] = [-9.0, -9.0]
    assert validate_table(make_table(rows)).rows == 6


@pytest.mark.parametrize(("score", "accepted"), [(-1.77, True), (-1.7, False), (-0.1, False)])
def test_a_sampled_token_outside_the_top_k_fits_into_what_that_leaves(score, accepted):
    """exp(-0.7) + exp(-1.1) = 0.829, so it has exp(-1.769) at most."""
    rows = make_rows()
    rows[4]["teacher_topk_ids"] = [[5, 6], [5, 6]]
    rows[4]["teacher_logprobs"] = [-9.0, score]
    if accepted:
        assert validate_table(make_table(rows)).rows == 6
        return
    message = refusal(make_table(rows))
    assert message.startswith(
        f"Row 4, column `teacher_logprobs`, token 1: the sampled token has probability {np.exp(score):.4f}, but the "
        "top-k without it leaves 0.170"
    )
    assert RESCORE in message


def test_nearly_certain_top_k_beside_a_token_that_rounding_leaves_no_room():
    """Within the tolerance of what float16 and two sums in float32 can do."""
    table = make_top_k_table([[1, 2]], [[-0.0002, -8.5]])
    assert np.exp([-0.0002, -8.5, -9.0]).sum() > 1 and validate_table(table).top_k == 2


# Where the bad row is


@pytest.mark.parametrize("batch_rows", [1, 2, 4, 7, 100])
def test_row_number_in_a_later_batch(batch_rows):
    rows = make_rows(20)
    put(rows, 17, "teacher_logprobs", 2, NAN)
    put(rows, 19, "teacher_logprobs", 1, NAN)
    message = refusal(make_table(rows), batch_rows=batch_rows)
    assert message.startswith("Row 17, column `teacher_logprobs`, token 2: nan")


@pytest.mark.parametrize("batch_rows", [3, 100])
def test_row_number_in_a_shuffled_dataset(batch_rows):
    rows = make_rows(20)
    put(rows, 17, "ref_logprobs", 2, NAN)
    table = make_table(rows).shuffle(seed=5)
    row = [ids[0] for ids in table["completion_ids"]].index(27)
    assert row != 17
    assert refusal(table, batch_rows=batch_rows).startswith(f"Row {row}, column `ref_logprobs`, token 2: nan")


def test_row_number_in_a_concatenated_dataset():
    rows = make_rows()
    put(rows, 4, "teacher_topk_logprobs", 1, NAN)
    table = concatenate_datasets([make_table(make_rows()), make_table(rows)])
    assert refusal(table).startswith("Row 10, column `teacher_topk_logprobs`, token 1: nan")


def test_row_number_in_a_stream():
    rows = make_rows()
    first = make_table(rows).with_format("arrow")[:3]
    summary = validate_rows(first)
    put(rows, 4, "ref_logprobs", 1, NAN)
    second = make_table(rows).with_format("arrow")[3:]
    with pytest.raises(TableError, match="^Row 4, column `ref_logprobs`, token 1"):
        validate_rows(second, first_row=summary.rows, top_k=summary.top_k)


def test_rows_of_a_sliced_arrow_table():
    rows = make_rows()
    put(rows, 4, "teacher_logprobs", 1, NAN)
    sliced = make_table(rows).data.table.slice(2)
    with pytest.raises(TableError, match="^Row 2, column `teacher_logprobs`, token 1: nan"):
        validate_rows(sliced)
    assert validate_rows(sliced.slice(3)).completion_tokens == 3


def test_stream_keeps_one_k():
    batch = make_table(make_rows()).with_format("arrow")[:]
    with pytest.raises(TableError, match="^Row 8, column `teacher_topk_ids`, token 0: 2 top-k values, where 4"):
        validate_rows(batch, first_row=8, top_k=4)


def test_only_a_dataset_can_be_validated_whole():
    table = make_table(make_rows())
    for other in (DatasetDict(train=table), table.to_iterable_dataset()):
        with pytest.raises(TypeError, match=f"{type(other).__name__}.*one split"):
            validate_table(other)


def test_rows_for_training_are_the_table_s_values():
    table = make_table(make_rows())
    table = concatenate_datasets([table, table]).shuffle(seed=0).add_column("note", ["x"] * 12).select(range(1, 11))
    rows = TableRows(table)
    assert len(rows) == 10
    for batch in ([3, 0, 9], [4]):
        for index, row in zip(batch, rows.__getitems__(batch), strict=True):
            expected = table[index]
            assert "note" not in row and "teacher_fingerprint" not in row
            for name, values in row.items():
                assert values.tolist() == expected[name], name
    assert rows[2]["teacher_topk_ids"].shape == (len(table[2]["completion_ids"]), 2)


# Types that hold the same values


REARRANGED = {
    "whole": lambda table: table,
    "slice": lambda table: table.select(range(2, 7)),
    "one row": lambda table: table.select([4]),
    "shuffle": lambda table: table.shuffle(seed=3),
    "filter": lambda table: table.filter(lambda row: row["prompt_ids"] != [0]),
    "map": lambda table: table.map(lambda row: {"teacher_topk_ids": row["teacher_topk_ids"]}),
    "concatenate": lambda table: concatenate_datasets([table.select([5, 1]), table.select(range(3, 8))]),
    "none": lambda table: table.select([]),
    "filter to none": lambda table: table.filter(lambda row: False),
}


def ragged_rows() -> list[dict]:
    """Rows of `make_row`, some of them emptied, at both ends and two in a row: no valid table, but readable."""
    rows = make_rows(9)
    for i in (0, 3, 4, 8):
        rows[i].update({name: [] for name in TOKEN_COLUMNS})
    return rows


@pytest.mark.parametrize("change", REARRANGED.values(), ids=list(REARRANGED))
@pytest.mark.parametrize("rows", [make_rows(9), ragged_rows()], ids=["full", "empty rows between"])
def test_the_type_changes_nothing_that_is_read(rows, change):
    fixed = change(make_table(rows))
    # A stable inner type is the point: nothing that `datasets` does to a table may widen it.
    assert fixed.features == FEATURES
    expected = fixed.with_format(None)[:]
    for features in (FEATURES, VARIABLE, LARGE, WIDE):
        table = change(make_table(rows, features))
        assert rows_digest(table) == rows_digest(fixed)
        assert content_digest(table) == content_digest(change(make_table(rows, features)))
        assert [of.tolist() for of in lengths(table)] == [
            [len(ids) for ids in expected[name]] for name in ("prompt_ids", "completion_ids")
        ]
        read = TableRows(table)
        for i, row in enumerate(read.__getitems__(list(range(len(table))))):
            assert row.keys() == set(FEATURES) - {"teacher_fingerprint"}
            for name, values in row.items():
                if name == "teacher_topk_logprobs":
                    values = values.astype(np.float16)
                assert values.tolist() == expected[name][i]
        if len(table) and all(expected["completion_ids"]):
            assert validate_table(table, batch_rows=2) == validate_table(fixed)
        elif len(table):
            assert "`completion_ids`: 0 tokens, so there is nothing to learn from" in refusal(table)


def test_rows_digest_sees_a_changed_value_and_where_rows_end():
    digests = {rows_digest(make_table(rows, features)) for rows in (make_rows(),) for features in (FEATURES, VARIABLE)}
    assert len(digests) == 1
    changed, moved = make_rows(), make_rows()
    put(changed, 4, "teacher_topk_ids", 1, 6)
    for name in ("teacher_topk_ids", "teacher_topk_logprobs"):
        # The same values one after another, in other rows.
        moved[1][name], moved[2][name] = moved[1][name] + moved[2][name][:1], moved[2][name][1:]
    assert len(digests | {rows_digest(make_table(rows)) for rows in (changed, moved)}) == 3


def test_a_table_of_variable_lists_joins_one_of_fixed_lists_after_a_cast():
    fixed, variable = make_table(make_rows()), make_table(make_rows(), VARIABLE)
    for one, other in ((fixed, variable), (variable, fixed)):
        with pytest.raises(ValueError, match="features can't be aligned because the key teacher_topk_ids"):
            concatenate_datasets([one, other])
        joined = concatenate_datasets([one.cast(other.features), other])
        assert joined.features == other.features
        assert rows_digest(joined) == rows_digest(concatenate_datasets([fixed, fixed]))
        assert validate_table(joined).rows == 12


def test_parquet_files_of_both_types_load_as_one_table(tmp_path):
    make_table(make_rows()).to_parquet(tmp_path / "fixed.parquet")
    make_table(make_rows(), VARIABLE).to_parquet(tmp_path / "variable.parquet")
    expected = rows_digest(make_table(make_rows() * 2))
    for names in (["fixed", "variable"], ["variable", "fixed"]):
        files = [str(tmp_path / f"{name}.parquet") for name in names]
        table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert table.features == (FEATURES if names[0] == "fixed" else VARIABLE)
        assert rows_digest(table) == expected and validate_table(table).rows == 12


@pytest.mark.parametrize("rows", [make_rows(9), ragged_rows()], ids=["full", "empty rows between"])
def test_shards_keep_fixed_lists(tmp_path, rows):
    table = make_table(rows)
    with ShardStore(tmp_path / "shards", pins={}, rows=9, rows_per_shard=4) as store:
        for shard in store.pending:
            store.write(shard, table.select(store.span(shard)).data.table)
    file = tmp_path / "shards" / "data-00001-of-00003.parquet"
    for loaded in (
        store.dataset(),
        load_dataset(str(tmp_path / "shards"), split="train", cache_dir=str(tmp_path / "cache")),
        Dataset.from_list(list(load_dataset(str(tmp_path / "shards"), split="train", streaming=True)), FEATURES),
    ):
        assert loaded.features == FEATURES
        assert rows_digest(loaded) == rows_digest(table)
    # To a reader that knows none of this, a list of lists.
    bare = pq.read_table(file).replace_schema_metadata(None)
    assert bare["teacher_topk_ids"].to_pylist() == [row["teacher_topk_ids"] for row in rows[4:8]]


PUSHED = """
import sys
from datasets import load_dataset, load_from_disk
from trl_lopd.table.schema import rows_digest
table = load_from_disk(sys.argv[1])
table.push_to_hub("tester/table", num_shards=2)
loaded = load_dataset("tester/table", split="train")
assert loaded.features == table.features, loaded.features
assert rows_digest(loaded) == rows_digest(table)
streamed = load_dataset("tester/table", split="train", streaming=True)
assert streamed.features == table.features, streamed.features
assert list(streamed) == list(table)
"""


@pytest.mark.slow
def test_the_hub_keeps_fixed_lists(tmp_path):
    make_table(make_rows()).save_to_disk(tmp_path / "table")
    (tmp_path / "push.py").write_text(PUSHED)
    with Hub() as hub:
        words = (tmp_path / "push.py", tmp_path / "table")
        done = ranks.launch(*words, processes=None, env=hub.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-3000:]


# Size and speed


def scored(top_k: int, tokens: int, rows: int = 20, ref: bool = False) -> Dataset:
    """What `score_rollouts` makes of fake scores, of rows of about `tokens` tokens."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(tokens // 2, 3 * tokens // 2, rows)

    def scores(k: int) -> list[Scores]:
        return [
            Scores(
                -rng.exponential(0.3, size).astype(np.float32),
                (rng.integers(0, 10_000, (size, 1)) + np.arange(k)).astype(np.int32),
                -rng.exponential(3, (size, k)).astype(np.float16),
            )
            for size in sizes
        ]

    ids = {"prompt_ids": [100] * rows, "completion_ids": sizes}
    rollouts = Dataset.from_dict(
        {name: [rng.integers(0, 150_000, size).astype(np.int32) for size in of] for name, of in ids.items()},
        features=Features({name: FEATURES[name] for name in ids}),
    )
    return with_scores(
        rollouts, f"teacher@1-{'0' * 12}-{'0' * 8}-{'0' * 8}", top_k, scores(top_k), scores(0) if ref else None
    )


@pytest.mark.parametrize("top_k", [0, 1, 4, 8, 32])
def test_a_token_takes_what_its_numbers_take(tmp_path, top_k):
    table = scored(top_k, tokens=300, rows=150)
    tokens = int(lengths(table)[1].sum())
    assert table.features == table_features(top_k)
    # Prompts are not scored: their ids cost the same whatever is stored about the completion.
    bound = 1.05 * (8 + 6 * top_k) * tokens
    completions = table.remove_columns("prompt_ids")
    assert completions.data.nbytes <= bound
    completions.save_to_disk(tmp_path / "table")
    (file,) = (tmp_path / "table").glob("*.arrow")
    assert file.stat().st_size <= bound + 4096  # the schema, and padding
    table.to_parquet(tmp_path / "theirs.parquet")
    with ShardStore(tmp_path / "shards", pins={}, rows=len(table), rows_per_shard=len(table)) as store:
        store.write(0, table.data.table)
    ours = (tmp_path / "shards" / "data-00000-of-00001.parquet").stat().st_size
    theirs = (tmp_path / "theirs.parquet").stat().st_size
    assert ours < table.data.nbytes and ours < theirs
    # In a small table without top-k columns, the dictionaries that `datasets` writes outweigh what they save.
    assert theirs < table.data.nbytes or top_k < 4


def test_rewriting_a_table_adds_nothing_to_it(tmp_path):
    """Neither `map` nor parquet may leave null bitmaps or offsets that were not there."""
    table = scored(8, tokens=300, ref=True)
    table.to_parquet(tmp_path / "table.parquet")
    loaded = Dataset.from_parquet(str(tmp_path / "table.parquet"), cache_dir=str(tmp_path / "cache"))
    for other in (loaded, table.map(lambda row: row), table.filter(lambda row: True).flatten_indices()):
        assert other.features == table.features
        assert other.data.nbytes <= table.data.nbytes + 64


def test_rows_are_views_of_the_arrow_buffers():
    """Nothing is made a token: what reading a row costs does not grow with its length."""
    for features in (FEATURES, VARIABLE, LARGE):
        for name, values in TableRows(make_table(make_rows(), features))[2].items():
            # Booleans are bits in Arrow.
            assert isinstance(values, np.ndarray) and (not values.flags.writeable or name == "completion_mask")
    batch = OfflineOPDCollator(pad_token_id=0)(TableRows(scored(8, tokens=50)).__getitems__([3, 1]))
    assert batch["teacher_topk_ids"].shape == (len(batch["labels"]), 8)
