"""Best-fit packing: every sequence once, rows never over capacity, and dense on real data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_jax.data.packing import best_fit, efficiency, pack
from posttrain_jax.data.tokenized import TokenizeOptions, build


def test_best_fit_by_hand():
    """Capacity 10, longest first: 7 | 6 | 4 fits best beside 6 | 3 beside 7 | 2 opens a row | 1 joins it."""
    assert best_fit([3, 7, 1, 4, 6, 2], 10) == [[1, 0], [4, 3], [5, 2]]


def test_the_fullest_row_with_room_is_taken():
    """Rows are left with room 2 and 3; a sequence of 2 goes where it leaves nothing, whichever was opened first."""
    assert best_fit([7, 8, 2], 10) == [[1, 2], [0]]
    assert best_fit([8, 7, 2, 3], 10) == [[0, 2], [1, 3]]


def test_edges():
    assert best_fit([], 8) == []
    assert best_fit([8, 8], 8) == [[0], [1]]
    for bad in ([9], [0]):
        with pytest.raises(ValueError):
            best_fit(bad, 8)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_packing_invariants(data):
    capacity = data.draw(st.integers(1, 64))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fills = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < fill <= capacity for fill in fills)
    assert rows == best_fit(lengths, capacity)
    # No two rows could be one: the later of them would have gone into the earlier.
    assert all(fills[i] + fills[j] > capacity for i in range(len(fills)) for j in range(i))


def test_many_sequences_are_packed_fast():
    import time

    lengths = np.random.default_rng(0).integers(1, 2048, 100_000)
    start = time.perf_counter()
    rows = best_fit(lengths, 2048)
    assert time.perf_counter() - start < 10  # 0.3 s on an idle machine
    assert lengths.sum() / (len(rows) * 2048) > 0.99


def test_alpaca_is_packed_to_95_percent(smollm2, alpaca_path, tmp_path):
    data = build(str(alpaca_path), smollm2, TokenizeOptions(max_length=1024), cache_dir=tmp_path)
    rows = pack(data, 1024)
    assert efficiency(rows) >= 0.95
    assert efficiency(pack(data, 1024, packed=False)) < 0.3


@pytest.mark.parametrize("packed", [True, False])
def test_rows_hold_their_sequences(packed, smollm2, write_jsonl, tmp_path):
    path = write_jsonl(*({"text": "word " * n} for n in (2, 30, 9, 17, 1)))
    data = build(path, smollm2, TokenizeOptions(max_length=32), cache_dir=tmp_path)
    (rows,) = pack(data, 32, packed=packed)
    assert len(rows) == (3 if packed else 5)
    found = []
    for r in range(len(rows)):
        row = rows[r]
        assert all(array.dtype == np.int32 and array.shape == (32,) for array in row.values())
        ids = rows.row_id(r).split(", ")
        for segment, i in enumerate(rows.sequences(r), 1):
            inside = row["segment_ids"] == segment
            encoded = data.sources[0].sequence(i)
            np.testing.assert_array_equal(row["tokens"][inside], encoded.tokens)
            np.testing.assert_array_equal(row["loss_mask"][inside], encoded.loss_mask)
            np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
            assert row["loss_mask"][inside][0] == 0
            assert ids[segment - 1] == f"{path}:{i + 1}"
            found.append(i)
        padding = row["segment_ids"] == 0
        assert not any(row[key][padding].any() for key in row)
        used = 32 - padding.sum()
        assert not padding[:used].any()
    assert sorted(found) == list(range(5))
