"""The stream of batches: seeded, the same for any number of hosts, resumed without reading what came before."""

from __future__ import annotations

import collections
import json
import types

import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.loader import Loader, eval_batch_count, eval_batches
from posttrain_jax.data.packing import PackedRows, pack
from posttrain_jax.data.tokenized import TokenizeOptions, build


@pytest.fixture(scope="module")
def rows(smollm2, tmp_path_factory):
    """23 rows of 8 tokens, one sequence in each."""
    return _rows(smollm2, tmp_path_factory.mktemp("loader"), [("a", 23, 1.0)])


def _rows(tokenizer, folder, sources):
    spec = []
    for name, count, weight in sources:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)))
        spec.append((str(path), weight))
    return pack(build(spec, tokenizer, TokenizeOptions(max_length=8), cache_dir=folder), 8, packed=False)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def ids(batches):
    return [row for batch in batches for row in batch.row_ids]


def test_an_epoch_has_every_row_once_in_another_order_each_time(rows):
    stream = ids(take(Loader(rows, rows_per_step=1, seed=0), 46))
    first, second = stream[:23], stream[23:]
    everything = [rows[0].row_id(i) for i in range(23)]
    assert sorted(first) == sorted(second) == sorted(everything)
    assert first != second and first != everything


def test_seed_decides_the_order(rows):
    streams = [ids(take(Loader(rows, rows_per_step=2, seed=seed), 10)) for seed in (0, 0, 1)]
    assert streams[0] == streams[1] != streams[2]


def test_without_shuffle(rows):
    stream = ids(take(Loader(rows, rows_per_step=2, seed=0, shuffle=False), 3))
    assert stream == [rows[0].row_id(i) for i in range(6)]


def test_arrays(rows):
    (batch,) = take(Loader(rows, rows_per_step=4, seed=0), 1)
    assert set(batch.arrays) == {"tokens", "loss_mask", "segment_ids", "positions"}
    assert all(array.shape == (4, 8) and array.dtype == np.int32 for array in batch.arrays.values())
    by_id = {rows[0].row_id(i): rows[0][i] for i in range(23)}
    for r, row_id in enumerate(batch.row_ids):
        np.testing.assert_array_equal(batch.arrays["tokens"][r], by_id[row_id]["tokens"])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_step(hosts, rows):
    whole = take(Loader(rows, rows_per_step=4, seed=3), 9)
    for host in range(hosts):
        share = take(Loader(rows, rows_per_step=4, seed=3, host_index=host, host_count=hosts), 9)
        for one, part in zip(whole, share, strict=True):
            assert part.row_ids == one.row_ids[host::hosts]
            for key, array in part.arrays.items():
                np.testing.assert_array_equal(array, one.arrays[key][host::hosts])


def test_hosts_must_divide_the_rows(rows):
    with pytest.raises(InputError, match="make it a multiple"):
        Loader(rows, rows_per_step=4, seed=0, host_count=3)


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("step", [0, 1, 5, 40])
def test_resume_is_exact(step, prefetch, rows):
    loader = Loader(rows, rows_per_step=4, seed=0, prefetch=prefetch)
    for _ in range(step):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = ids(take(loader, 8))
    again = Loader(rows, rows_per_step=4, seed=0)
    next(again)
    again.set_state(state)
    assert again.get_state() == state
    assert ids(take(again, 8)) == expected


def test_resume_on_another_number_of_hosts(rows):
    two = Loader(rows, rows_per_step=4, seed=0, host_index=1, host_count=2)
    take(two, 6)
    state = two.get_state()
    whole = take(Loader(rows, rows_per_step=4, seed=0), 9)[6:]
    for host in range(4):
        four = Loader(rows, rows_per_step=4, seed=0, host_index=host, host_count=4)
        four.set_state(state)
        assert ids(take(four, 3)) == [batch.row_ids[host] for batch in whole]


def test_resume_with_other_rows_per_step(rows):
    loader = Loader(rows, rows_per_step=4, seed=0)
    take(loader, 3)
    state = loader.get_state()
    stream = ids(take(Loader(rows, rows_per_step=1, seed=0), 18))
    wider = Loader(rows, rows_per_step=6, seed=0)
    wider.set_state(state)
    assert ids(take(wider, 1)) == stream[12:18]
    with pytest.raises(InputError, match="no whole number of steps"):
        Loader(rows, rows_per_step=5, seed=0).set_state(state)


def test_resume_reads_no_earlier_rows(rows):
    """Rows that are read are written down; resuming at step 40 reads those of the steps from 40 on."""
    (whole,) = rows
    read: list[int] = []

    class Watched(PackedRows):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    watched = [Watched(whole.source, whole.plan, whole.starts, whole.max_length)]
    loader = Loader(watched, rows_per_step=1, seed=0, prefetch=0)
    loader.set_state({**loader.get_state(), "rows": 1_000_000})
    assert read == []
    batches = take(loader, 3)
    assert [whole.row_id(row) for row in read] == ids(batches)


def test_other_data_or_seed_are_refused(rows, smollm2, tmp_path):
    state = Loader(rows, rows_per_step=1, seed=0).get_state()
    with pytest.raises(InputError, match="seed"):
        Loader(rows, rows_per_step=1, seed=1).set_state(state)
    other = _rows(smollm2, tmp_path, [("a", 22, 1.0)])
    with pytest.raises(InputError, match="training data"):
        Loader(other, rows_per_step=1, seed=0).set_state(state)
    moved = _rows(smollm2, tmp_path, [("a", 23, 1.0)])  # the same rows in another file
    Loader(moved, rows_per_step=1, seed=0).set_state(state)


def test_mixture_follows_the_weights(smollm2, tmp_path):
    rows = _rows(smollm2, tmp_path, [("a", 5, 3.0), ("b", 40, 1.0)])
    loader = Loader(rows, rows_per_step=4, seed=0)
    stream = ids(take(loader, 20))
    names = [row.rsplit("/", 1)[1][0] for row in stream]
    assert collections.Counter(names) == {"a": 60, "b": 20}
    assert all(abs(names[:n].count("a") - 0.75 * n) <= 1 for n in range(1, 81))
    of_a = [row for row in stream if "/a." in row]
    for epoch in range(12):
        assert len(set(of_a[5 * epoch : 5 * epoch + 5])) == 5
    again = Loader(rows, rows_per_step=4, seed=0)
    again.set_state({**again.get_state(), "rows": 40})
    assert ids(take(again, 10)) == stream[40:]


def test_one_row(smollm2, tmp_path):
    rows = _rows(smollm2, tmp_path, [("a", 1, 1.0)])
    assert len(set(ids(take(Loader(rows, rows_per_step=2, seed=0), 3)))) == 1


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_is_one_pass_in_order(hosts, rows):
    shares = [
        list(eval_batches(rows, rows_per_step=4, host_index=host, host_count=hosts)) for host in range(hosts)
    ]
    assert {len(share) for share in shares} == {6} == {eval_batch_count(rows, rows_per_step=4)}
    merged = [share[step].row_ids[r] for step in range(6) for r in range(4 // hosts) for share in shares]
    assert merged == [rows[0].row_id(i) for i in range(23)] + [""]
    last = shares[-1][-1]
    assert last.arrays["tokens"].shape == (4 // hosts, 8)
    assert not any(last.arrays[key][-1].any() for key in last.arrays)


def test_evaluation_over_two_sources(smollm2, tmp_path):
    rows = _rows(smollm2, tmp_path, [("a", 3, 1.0), ("b", 2, 9.0)])
    batches = list(eval_batches(rows, rows_per_step=2))
    assert isinstance(eval_batches(rows, rows_per_step=2), types.GeneratorType)
    assert ids(batches) == [part.row_id(i) for part in rows for i in range(len(part))] + [""]
