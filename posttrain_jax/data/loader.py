"""Batches for one host: seeded shuffle, endless epochs, weighted mixtures, prefetch, O(1) resume.

The order of rows is one global stream that does not depend on the number of hosts: with R rows a step, step s takes
rows s*R to (s+1)*R - 1, and host p of P takes p, p + P, ... of them. So a state is a count of rows, and a run can be
resumed by any number of hosts. Every epoch has its own shuffle; a step may hold the end of one and the start of the
next. In a mixture each source has its own epochs, and sources take turns by weight (grain.MapDataset.mix).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from posttrain_jax.core.errors import InputError

# Rows in an endless stream. Grain's own endless repeat overflows when a batch is one row.
_ENDLESS = 2**45


class RowSource(Protocol):
    """Rows of one source: `packing.PackedRows`, or `preference_rows.PreferenceRows`."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Any: ...
    def row_id(self, row: int) -> str: ...
    def fingerprint(self) -> bytes: ...
    def collate(self, rows: Sequence[Any]) -> dict[str, np.ndarray]: ...
    @property
    def weight(self) -> float: ...
    @property
    def sequence_lengths(self) -> np.ndarray:
        """int64, tokens in each sequence."""


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """This host's rows of one step.

    Attributes:
      arrays: what the source's `collate` makes of them: the leaves of a batch, `[rows, ...]`.
      row_ids: for each row, "file:line" of the sequences in it ("" for an empty row).
    """

    arrays: dict[str, np.ndarray]
    row_ids: list[str]


class Loader:
    """Endless batches over packed rows.

    Args:
      rows: one part for each source; all parts collate alike.
      rows_per_step: rows of one step over all hosts.
      seed: of the shuffle.
      host_index, host_count: which share of each step this process takes.
      shuffle: False keeps the rows' order in every epoch.
      prefetch: batches made ahead, by two threads; 0 makes each when it is asked for.

    Raises InputError when the hosts do not divide `rows_per_step`.
    """

    def __init__(
        self,
        rows: Sequence[RowSource],
        *,
        rows_per_step: int,
        seed: int,
        host_index: int = 0,
        host_count: int = 1,
        shuffle: bool = True,
        prefetch: int = 4,
    ) -> None:
        _check_rows_per_step(rows_per_step, host_count)
        self._rows = list(rows)
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._step = 0
        self._fingerprint = _fingerprint(self._rows, shuffle)
        per_host = rows_per_step // host_count
        parts = [self._part(number, part, shuffle) for number, part in enumerate(self._rows)]
        if len(parts) == 1:
            stream = parts[0]
        else:
            stream = grain.MapDataset.mix(parts, [part.weight for part in self._rows])
        batches = stream.slice(slice(host_index, None, host_count)).batch(per_host, batch_fn=self._collate)
        options = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
        self._batches = iter(batches.to_iter_dataset(options))

    def _part(self, number: int, rows: RowSource, shuffle: bool) -> grain.MapDataset:
        def load(row: int) -> _Taken:
            return number, row, rows[row]

        dataset = grain.MapDataset.range(len(rows))
        if shuffle:
            seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1, np.uint32)[0])
            dataset = dataset.shuffle(seed=seed)
        return dataset.repeat(_ENDLESS // len(rows) + 1).map(load)

    def _collate(self, taken: Sequence[_Taken]) -> _Loaded:
        return _load(self._rows[0], taken)

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        loaded = next(self._batches)
        self._step += 1
        return _host_batch(self._rows, loaded)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs, as JSON values: the batches handed out so far, and what they were made from."""
        return {"rows": self._step * self._rows_per_step, "seed": self._seed, "data": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, without reading what came before.

        Raises InputError when the data or the seed is another, or the rows do not make whole steps.
        """
        if state["seed"] != self._seed:
            raise InputError(
                f"the checkpoint's data order was made with seed {state['seed']}, not {self._seed}"
            )
        if state["data"] != self._fingerprint:
            raise InputError(
                "the training data (or the tokenizer, template, max_length, packing, weights or reference model) is "
                "not what the checkpoint was trained on; restore the data, or start in a new workdir"
            )
        step, rest = divmod(state["rows"], self._rows_per_step)
        if rest:
            raise InputError(
                f"the checkpoint stands after {state['rows']} rows, which is no whole number of steps of "
                f"train.rows_per_step={self._rows_per_step}"
            )
        self._batches.set_state({"next_index": step})
        self._step = step

    def close(self) -> None:
        """Stops the prefetch threads."""
        self._batches.close()


def eval_batches(
    rows: Sequence[RowSource], *, rows_per_step: int, host_index: int = 0, host_count: int = 1
) -> Iterator[HostBatch]:
    """One pass over all rows in order. Every host gets the same number of batches; empty rows fill the last."""
    _check_rows_per_step(rows_per_step, host_count)
    positions = [(number, row) for number, part in enumerate(rows) for row in range(len(part))]
    for start in range(0, len(positions), rows_per_step):
        taken: list[_Taken] = []
        for index in range(start + host_index, start + rows_per_step, host_count):
            if index < len(positions):
                number, row = positions[index]
                taken.append((number, row, rows[number][row]))
            else:
                taken.append((-1, -1, None))
        yield _host_batch(rows, _load(rows[0], taken))


def eval_batch_count(rows: Sequence[RowSource], *, rows_per_step: int) -> int:
    """How many batches `eval_batches` gives."""
    return -(-sum(len(part) for part in rows) // rows_per_step)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A batch as the prefetch threads make it; `positions` are (source number, row)."""

    arrays: dict[str, np.ndarray]
    positions: list[tuple[int, int]]


# Source number, row, and the row itself (None = an empty one).
_Taken = tuple[int, int, Any]


def _load(part: RowSource, taken: Sequence[_Taken]) -> _Loaded:
    arrays = part.collate([row for _, _, row in taken])
    return _Loaded(arrays, [(int(number), int(row)) for number, row, _ in taken])


def _host_batch(rows: Sequence[RowSource], loaded: _Loaded) -> HostBatch:
    ids = [rows[number].row_id(row) if number >= 0 else "" for number, row in loaded.positions]
    return HostBatch(loaded.arrays, ids)


def _check_rows_per_step(rows_per_step: int, host_count: int) -> None:
    if rows_per_step < 1 or rows_per_step % host_count:
        raise InputError(
            f"train.rows_per_step={rows_per_step} cannot be shared by {host_count} processes; "
            "make it a multiple of their number"
        )


def _fingerprint(rows: Sequence[RowSource], shuffle: bool) -> str:
    """A hash of everything that decides the order and the contents of the stream, but the seed."""
    digest = hashlib.sha256(str(shuffle).encode())
    for part in rows:
        digest.update(part.fingerprint())
    return digest.hexdigest()[:32]
