"""Packs, boundaries between the rows of one, and that a step is the same however its rows are read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trl_lopd.packing import PackedRows, best_fit_decreasing
from trl_lopd.table import TableRows


def fewest_packs(lengths, capacity):
    """By trying all ways to put each row into a pack there is, or a new one."""
    best = len(lengths)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for room in {room for room in rooms if room >= lengths[i]}:
            j = rooms.index(room)
            place(i + 1, rooms[:j] + [room - lengths[i]] + rooms[j + 1 :])
        place(i + 1, rooms + [capacity - lengths[i]])

    place(0, [])
    return best


def assert_packed(packs, lengths, capacity):
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert all(lengths[pack].sum() <= capacity for pack in packs)


@pytest.mark.parametrize("seed", range(40))
def test_packs_are_few(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(4, 30))
    lengths = rng.integers(1, capacity + 1, 9)
    packs = best_fit_decreasing(lengths, capacity)
    assert_packed(packs, lengths, capacity)
    assert len(packs) <= 11 / 9 * fewest_packs(lengths.tolist(), capacity) + 1


@pytest.mark.parametrize("capacity", [512, 4096, 40_000])
def test_many_rows(capacity):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, 20_000).astype(int), 1, capacity)
    packs = best_fit_decreasing(lengths, capacity)
    assert_packed(packs, lengths, capacity)
    # No packing needs fewer than all tokens fill, or than there are rows of more than half a pack.
    least = max(-(-lengths.sum() // capacity), (lengths > capacity / 2).sum())
    assert len(packs) <= 11 / 9 * least + 1


def test_each_row_goes_where_the_least_room_is_left():
    packs = best_fit_decreasing(np.array([2, 6, 7, 3, 10, 1]), 10)
    assert [pack.tolist() for pack in packs] == [[4], [2, 3], [1, 0, 5]]


def test_a_row_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="A row of 11 tokens does not fit into packs of 10"):
        best_fit_decreasing(np.array([3, 11]), 10)


def test_packed_rows_are_the_table_s(table):
    rows = TableRows(table)
    packed = PackedRows(rows, [np.array([5, 0]), np.array([3]), np.array([1, 2, 4])])
    assert len(packed) == 3
    for found, expected in zip(packed.__getitems__([2, 0]), ([1, 2, 4], [5, 0]), strict=True):
        assert [row["completion_ids"].tolist() for row in found] == table[expected]["completion_ids"]
    assert len(packed[1]) == 1 and packed[1][0]["prompt_ids"].tolist() == table[3]["prompt_ids"]
