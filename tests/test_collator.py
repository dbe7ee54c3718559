"""Alignment, padding and truncation of the per-token columns."""

from __future__ import annotations

import pytest
import torch

from trl_lopd.collator import OfflineOPDCollator
from trl_lopd.table import TableError

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


def test_every_column_is_aligned_with_its_token():
    batch = OfflineOPDCollator(pad_token_id=9, teacher_logprob_floor=-50.0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 7, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [7, 9, 7]
    # The tokens before them, in the flattened input.
    assert batch["positions"].tolist() == [1, 3, 5]
    assert batch["sequences"].tolist() == [0, 0, 1]
    torch.testing.assert_close(batch["teacher_logprobs"], torch.tensor([-0.1, -50.0, -0.5]))
    torch.testing.assert_close(batch["ref_logprobs"], torch.tensor([-1.0, -3.0, -0.6]))
    assert batch["teacher_topk_ids"].dtype == torch.long
    assert batch["teacher_topk_ids"].tolist() == [[7, 1], [9, 3], [7, 4]]
    assert batch["teacher_topk_logprobs"][1, 1] == -50.0
    assert not batch["truncated"].any()


def test_the_floor_stands_in_for_minus_infinity_only():
    row = ROWS[0] | {"teacher_logprobs": [-0.1, -80.0, float("-inf")], "completion_mask": [True] * 3}
    batch = OfflineOPDCollator(pad_token_id=9, teacher_logprob_floor=-50.0)([row])
    torch.testing.assert_close(batch["teacher_logprobs"], torch.tensor([-0.1, -80.0, -50.0]))


def test_truncation_cuts_the_completion_and_all_its_columns():
    batch = OfflineOPDCollator(pad_token_id=0, max_length=4)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 7, 0, 0]]
    assert batch["labels"].tolist() == [7, 7]
    assert len(batch["teacher_logprobs"]) == len(batch["teacher_topk_ids"]) == 2
    assert batch["truncated"].tolist() == [True, False]
    assert OfflineOPDCollator(pad_token_id=0, max_completion_length=1)(ROWS)["input_ids"].tolist() == [
        [5, 6, 7],
        [5, 7, 0],
    ]


def test_padding_to_a_multiple():
    assert OfflineOPDCollator(pad_token_id=0, pad_to_multiple_of=8)(ROWS)["input_ids"].shape == (2, 8)


def test_no_room_is_an_error():
    with pytest.raises(TableError, match="prompt of 2 tokens leaves no room.*`max_length=2`.*filter"):
        OfflineOPDCollator(pad_token_id=0, max_length=2)(ROWS)
    late = [ROWS[0] | {"completion_mask": [False, False, True]}]
    with pytest.raises(TableError, match="beyond its first 2 tokens.*max_completion_length"):
        OfflineOPDCollator(pad_token_id=0, max_completion_length=2)(late)
