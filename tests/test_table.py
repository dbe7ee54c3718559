from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value, concatenate_datasets, load_from_disk

from trl_lopd.table import (
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    TOKEN_COLUMNS,
    TableError,
    TableRows,
    TableSummary,
    lengths,
    table_features,
    validate_rows,
    validate_table,
    vocab_limits,
)

FEATURES = table_features(top_k=2, ref_logprobs=True, completion_mask=True)
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
        assert loaded.data.schema.field("teacher_topk_logprobs").type == pa.list_(pa.list_(pa.float16()))
        assert validate_table(loaded) == expected


def test_large_lists():
    large = Features(
        {
            name: LargeList(LargeList(feature.feature.feature))
            if name.startswith("teacher_topk")
            else (LargeList(feature.feature) if isinstance(feature, List) else Value("large_string"))
            for name, feature in FEATURES.items()
        }
    )
    table = make_table(make_rows(), large)
    assert pa.types.is_large_list(table.data.schema.field("completion_ids").type)
    assert validate_table(table, batch_rows=4) == validate_table(make_table(make_rows()))
    assert lengths(table)[1].tolist() == [1, 2, 3, 1, 2, 3]


def test_fixed_size_lists():
    fixed = Features(
        {
            **FEATURES,
            "teacher_topk_ids": List(List(Value("int32"), length=2)),
            "teacher_topk_logprobs": List(List(Value("float16"), length=2)),
        }
    )
    table = make_table(make_rows(), fixed).select(range(1, 6))
    assert pa.types.is_fixed_size_list(table.data.schema.field("teacher_topk_ids").type.value_type)
    assert validate_table(table, batch_rows=2).top_k == 2


def test_wider_types_are_accepted():
    rows = [{name: row[name] for name in REQUIRED_COLUMNS} for row in make_rows()]
    table = Dataset.from_list(rows)
    assert table.features["completion_ids"] == List(Value("int64"))
    assert validate_table(table).completion_tokens == 12


def test_features_hold_the_columns_asked_for():
    assert tuple(table_features()) == REQUIRED_COLUMNS
    assert set(FEATURES) == {*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS}
    assert set(FEATURES) - set(TOKEN_COLUMNS) == {"prompt_ids", "teacher_fingerprint"}
    assert FEATURES["teacher_topk_logprobs"] == List(List(Value("float16")))


def test_lengths():
    table = make_table(make_rows(2500))
    order = np.random.default_rng(0).permutation(2500)
    prompt, completion = lengths(table.select(order))
    assert prompt.dtype == completion.dtype == np.int64
    assert prompt.tolist() == [i % 2 + 1 for i in order]
    assert completion.tolist() == [i % 3 + 1 for i in order]
    assert [part.shape for part in lengths(table.select([]))] == [(0,), (0,)]


def test_import_needs_neither_torch_nor_transformers():
    code = "import sys, trl_lopd.table; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Structure


@pytest.mark.parametrize("name", REQUIRED_COLUMNS)
def test_missing_column(name):
    message = refusal(without(make_table(make_rows()), name))
    assert message == f"Missing column `{name}`. Make the table with `score_rollouts`, which writes it."


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
    assert f", where {needed} is needed. Cast it to its type in `table_features`" in message


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
def test_null(name, value):
    rows = make_rows()
    rows[2][name] = value
    assert refusal(make_table(rows)) == f"Row 2, column `{name}`: a null where a value is needed. {RESCORE}"


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
    message = refusal(make_table(rows), batch_rows=batch_rows)
    assert message.startswith(f"Row 4, column `{name}`, token 1: {k} top-k values, where 2 are needed.")
    assert "Score all rows with `score_rollouts` and one k of at least 1." in message


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_one_k_in_both_columns_of_the_whole_table(batch_rows):
    rows = make_rows()
    rows[3].update({"teacher_topk_ids": [[5, 13, 6]], "teacher_topk_logprobs": [[-0.7, -1.1, -3.0]]})
    message = refusal(make_table(rows), batch_rows=batch_rows)
    assert message.startswith("Row 3, column `teacher_topk_ids`, token 0: 3 top-k values, where 2 are needed.")


def test_k_of_zero():
    empty = {"teacher_topk_ids": [[]], "teacher_topk_logprobs": [[]]}
    message = refusal(make_table([{**make_row(0), **empty}]))
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
        ("teacher_topk_ids", 20, None, 20),
        ("teacher_topk_ids", 20, 30, 30),
        ("teacher_topk_ids", None, 30, 30),
    ],
)
def test_id_out_of_vocabulary(name, tokenizer_size, model_size, limit):
    tokenizer = tokenizer_size and fake_tokenizer(tokenizer_size)
    model_config = model_size and fake_config(model_size)
    rows = make_rows()
    put(rows, 5, name, 1, limit - 1)
    assert validate_table(make_table(rows), tokenizer, model_config).rows == 6
    put(rows, 5, name, 1, limit)
    message = refusal(make_table(rows), tokenizer, model_config)
    assert message.startswith(f"Row 5, column `{name}`, token 1: {limit}, but token ids are 0 to {limit - 1}.")
    assert "Make the table with the tokenizer and model you train" in message


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
