"""What a batch says of its rows: the trained tokens, where they are predicted, and truncation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trl_lopd.table.schema import TableError
from trl_lopd.training.collator import OfflineOPDCollator

ROWS = [
    {
        "prompt_ids": [5, 6],
        "completion_ids": [7, 8, 9],
        "teacher_logprobs": [-0.1, -0.2, float("-inf")],
        "ref_logprobs": [-1.0, -2.0, -3.0],
        "completion_mask": [True, False, True],
        "teacher_topk_ids": [[7, 1], [8, 2], [9, 3]],
        "teacher_topk_logprobs": [[-0.1, -3.0], [-0.2, -4.0], [-0.3, float("-inf")]],
    },
    {
        "prompt_ids": [5],
        "completion_ids": [7],
        "teacher_logprobs": [-0.5],
        "ref_logprobs": [-0.6],
        "completion_mask": [True],
        "teacher_topk_ids": [[7, 4]],
        "teacher_topk_logprobs": [[-0.5, -1.5]],
    },
]
DTYPES = {
    "prompt_ids": np.int32,
    "completion_ids": np.int32,
    "teacher_logprobs": np.float32,
    "ref_logprobs": np.float32,
    "completion_mask": bool,
    "teacher_topk_ids": np.int32,
    "teacher_topk_logprobs": np.float16,
}


def as_arrays(row):
    """As `TableRows` gives it: arrays that cannot be written to."""
    row = {name: np.array(values, DTYPES[name]) for name, values in row.items()}
    for values in row.values():
        values.flags.writeable = False
    return row


def random_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt, tokens = rng.integers(1, 6), rng.integers(1, 12)
        mask = rng.random(tokens) < 0.7
        mask[0] = True
        rows.append(
            {
                "prompt_ids": rng.integers(1, 90, prompt),
                "completion_ids": rng.integers(1, 90, tokens),
                "teacher_logprobs": -rng.random(tokens),
                "completion_mask": mask,
                "teacher_topk_ids": rng.integers(1, 90, (tokens, 3)),
                "teacher_topk_logprobs": -rng.random((tokens, 3)),
            }
        )
    return [as_arrays(row) for row in rows]


@pytest.mark.parametrize("rows", [ROWS, [as_arrays(row) for row in ROWS]], ids=["lists", "arrays"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_every_trained_token_is_found_where_it_is_predicted(rows, padding_free):
    batch = OfflineOPDCollator(pad_token_id=9, teacher_logprob_floor=-50.0, padding_free=padding_free)(rows)
    if padding_free:
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 5, 7]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]] and "attention_mask" not in batch
        assert batch["positions"].tolist() == [1, 3, 5]
    else:
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 7, 9, 9, 9]]
        assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]] and "position_ids" not in batch
        assert batch["positions"].tolist() == [1, 3, 5]
    assert batch["labels"].tolist() == [7, 9, 7] and batch["sequences"].tolist() == [0, 0, 1]
    torch.testing.assert_close(batch["teacher_logprobs"], torch.tensor([-0.1, -50.0, -0.5]))
    torch.testing.assert_close(batch["ref_logprobs"], torch.tensor([-1.0, -3.0, -0.6]))
    assert batch["teacher_topk_ids"].tolist() == [[7, 1], [9, 3], [7, 4]]
    # float16 rounds to 2**-11 of the value.
    expected = torch.tensor([[-0.1, -3.0], [-0.3, -50.0], [-0.5, -1.5]])
    torch.testing.assert_close(batch["teacher_topk_logprobs"], expected, rtol=2**-11, atol=0)
    assert batch["truncated"].tolist() == [False, False]
    dtypes = {name: values.dtype for name, values in batch.items()}
    assert dtypes.pop("truncated") == torch.bool
    assert all((dtype == torch.float32) == name.endswith("logprobs") for name, dtype in dtypes.items())
    assert set(dtypes.values()) == {torch.int64, torch.float32}


@pytest.mark.parametrize("limits", [{}, {"max_completion_length": 4}, {"max_length": 7}, {"pad_to_multiple_of": 8}])
def test_padded_and_padding_free_say_the_same(limits):
    rows = random_rows(30)
    padded = OfflineOPDCollator(pad_token_id=0, **limits)(rows)
    flat = OfflineOPDCollator(pad_token_id=0, padding_free=True, **limits)(rows)
    real = padded["attention_mask"].flatten().bool()
    assert flat["input_ids"].flatten().tolist() == padded["input_ids"].flatten()[real].tolist()
    # The padded position, counted without padding, is the flat one.
    assert (real.cumsum(0)[padded["positions"]] - 1).tolist() == flat["positions"].tolist()
    assert (flat["position_ids"].flatten() == 0).sum() == len(rows)
    same = padded.keys() - {"input_ids", "attention_mask", "positions"}
    assert same == flat.keys() - {"input_ids", "position_ids", "positions"}
    assert all(torch.equal(padded[name], flat[name]) for name in same)
    for batch in (padded, flat):
        assert torch.equal(batch["input_ids"].flatten()[batch["positions"] + 1], batch["labels"])
        assert batch["sequences"].unique_consecutive().tolist() == list(range(len(rows)))
    cut = [np.flatnonzero(row["completion_mask"]).size for row in rows]
    counts = padded["sequences"].bincount().tolist()
    assert counts == cut if "max_" not in str(limits) else sum(counts) < sum(cut)


def test_the_floor_stands_in_for_minus_infinity_only():
    row = ROWS[0] | {"teacher_logprobs": [-80.0, -0.1, float("-inf")]}
    batch = OfflineOPDCollator(pad_token_id=9, teacher_logprob_floor=-50.0)([row])
    torch.testing.assert_close(batch["teacher_logprobs"], torch.tensor([-80.0, -50.0]))


def test_truncation_cuts_the_completion_and_all_its_columns():
    batch = OfflineOPDCollator(pad_token_id=0, max_length=4)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 7, 0, 0]]
    assert batch["labels"].tolist() == [7, 7] and batch["positions"].tolist() == [1, 4]
    assert all(len(batch[name]) == 2 for name in batch)
    assert batch["truncated"].tolist() == [True, False]
    assert OfflineOPDCollator(pad_token_id=0, max_completion_length=1)(ROWS)["input_ids"].tolist() == [
        [5, 6, 7],
        [5, 7, 0],
    ]


def test_padding_to_a_multiple():
    batch = OfflineOPDCollator(pad_token_id=0, pad_to_multiple_of=8)(ROWS)
    assert batch["input_ids"].shape == (2, 8) and batch["positions"].tolist() == [1, 3, 8]


def test_no_room_is_an_error():
    with pytest.raises(TableError, match="prompt of 2 tokens leaves no room.*`max_length=2`.*filter"):
        OfflineOPDCollator(pad_token_id=0, max_length=2)(ROWS)
    late = [ROWS[0] | {"completion_mask": [False, False, True]}]
    with pytest.raises(TableError, match="beyond its first 2 tokens.*max_completion_length"):
        OfflineOPDCollator(pad_token_id=0, max_completion_length=2)(late)


def test_a_pack_stands_for_its_rows_and_all_rows_are_read():
    rows, seen = random_rows(5), []
    collator = OfflineOPDCollator(pad_token_id=0, padding_free=True, read=lambda rows: seen.extend(rows) or rows)
    batch = collator([rows[:3], rows[3], rows[4:]])
    assert [id(row) for row in seen] == [id(row) for row in rows]
    expected = collator(rows)
    assert all(
        torch.equal(batch[name], expected[name])
        for name in ("input_ids", "positions", "labels", "sequences", "teacher_logprobs")
    )


def test_rows_that_nobody_has_read_yet_bring_who_scored_and_sampled_them():
    rows = [row | {"teacher_fingerprint": f"t{i}"} for i, row in enumerate(random_rows(4))]
    rows[2]["student_fingerprint"] = "s"
    parts = OfflineOPDCollator(pad_token_id=0, max_tokens=24, read=list)(rows)
    found = [
        pair for part in parts for pair in zip(part["teacher_fingerprint"], part["student_fingerprint"], strict=True)
    ]
    assert sorted(found, key=str) == [("t0", None), ("t1", None), ("t2", "s"), ("t3", None)]
    assert "teacher_fingerprint" not in OfflineOPDCollator(pad_token_id=0)(rows)


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 8}, {"padding_free": True}])
def test_micro_batches_hold_every_row_once_within_the_budget(options):
    rows = random_rows(40)
    for i, row in enumerate(rows):
        row["teacher_logprobs"] = np.full(len(row["completion_ids"]), -1.0 - i)
    parts = OfflineOPDCollator(pad_token_id=0, max_tokens=48, **options)(rows)
    assert all(part["input_ids"].numel() <= 48 for part in parts)
    found = [-1 - int(value) for part in parts for value in part["teacher_logprobs"].unique_consecutive()]
    assert sorted(found) == list(range(40))
    # As few as fit: no two of them would be one.
    tokens = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    if "padding_free" in options:
        assert len(parts) <= -(-sum(tokens) // 48) + 1
    elif not options:
        widths = [part["input_ids"].shape for part in parts]
        assert all((n + 1) * width > 48 for n, width in widths[:-1])


def test_a_row_longer_than_the_budget_is_an_error():
    for options, length in (({}, 5), ({"padding_free": True}, 5), ({"pad_to_multiple_of": 8}, 8)):
        with pytest.raises(TableError, match=f"{length} tokens in one row.*`max_tokens_per_device=4`"):
            OfflineOPDCollator(pad_token_id=0, max_tokens=4, **options)(ROWS)
