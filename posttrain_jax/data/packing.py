"""Sequences packed into rows of fixed length: best fit, longest first.

Best-fit decreasing puts each sequence, longest first, into the fullest row that still has room. Rows are found by
the room that they have left (at most `capacity` distinct values, kept sorted), so packing n sequences takes
O(n log n). Packed sequences do not see each other: segment ids number them and positions restart.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from posttrain_jax.data.tokenized import TokenizedData, TokenizedSource

KEYS = ("tokens", "loss_mask", "segment_ids", "positions")


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of sequence numbers; equal lengths keep their order, so the result is deterministic.

    Args:
      lengths: tokens in each sequence; none may exceed `capacity` (ValueError).
      capacity: tokens in a row.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and (sizes.max() > capacity or sizes.min() < 1):
        raise ValueError(f"sequence lengths must lie between 1 and {capacity}")
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_by_room, sorted
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[at]
        rows[row].append(i)
        left = room - size
        if left:
            if left not in rows_by_room:
                rows_by_room[left] = []
                bisect.insort(rooms, left)
            rows_by_room[left].append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of `max_length` tokens over one source; a row is made when it is asked for.

    Attributes:
      source: the sequences.
      plan: int64, the sequence numbers of all rows, one row after another.
      starts: int64 `[rows + 1]`, row r holds the sequences plan[starts[r]:starts[r + 1]].
      max_length: tokens in a row.
    """

    source: TokenizedSource
    plan: np.ndarray
    starts: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """tokens, loss_mask, segment_ids and positions of a row, each int32 `[max_length]`; padding is 0."""
        arrays = empty_row(self.max_length)
        at = 0
        for segment, i in enumerate(self.sequences(row), 1):
            encoded = self.source.sequence(i)
            end = at + len(encoded.tokens)
            arrays["tokens"][at:end] = encoded.tokens
            arrays["loss_mask"][at:end] = encoded.loss_mask
            arrays["segment_ids"][at:end] = segment
            arrays["positions"][at:end] = np.arange(end - at)
            at = end
        return arrays

    @property
    def weight(self) -> float:
        """Share in a mixture."""
        return self.source.weight

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int64, tokens in each sequence of the rows."""
        return self.source.lengths[self.plan]

    def collate(self, rows: Sequence[dict[str, np.ndarray] | None]) -> dict[str, np.ndarray]:
        """Rows (None = an empty one) as the leaves of a `Batch`, `[rows, max_length]`."""
        filled = [empty_row(self.max_length) if row is None else row for row in rows]
        return {key: np.stack([row[key] for row in filled]) for key in KEYS}

    def fingerprint(self) -> bytes:
        """A hash of everything that decides the rows and their contents."""
        digest = hashlib.sha256(
            f"{self.source.store.meta['sha256']} {self.weight!r} {self.max_length}".encode()
        )
        for array in (self.source.index, self.plan, self.starts):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.digest()

    def sequences(self, row: int) -> list[int]:
        """The sequence numbers in a row, in order."""
        return self.plan[self.starts[row] : self.starts[row + 1]].tolist()

    def row_id(self, row: int) -> str:
        """Where the row's sequences came from, "file:line, file:line"."""
        return ", ".join(self.source.row_id(i) for i in self.sequences(row))


def empty_row(max_length: int) -> dict[str, np.ndarray]:
    """A row of padding alone."""
    return {key: np.zeros(max_length, np.int32) for key in KEYS}


def pack(data: TokenizedData, max_length: int, *, packed: bool = True) -> list[PackedRows]:
    """Rows for every source, apart from each other so that they can be mixed; `packed=False`: one sequence a row."""
    return [_pack_source(source, max_length, packed) for source in data.sources]


def _pack_source(source: TokenizedSource, max_length: int, packed: bool) -> PackedRows:
    lengths = source.lengths
    rows = best_fit(lengths, max_length) if packed else [[i] for i in range(len(lengths))]
    starts = np.cumsum([0, *(len(row) for row in rows)])
    plan = np.asarray([i for row in rows for i in row], np.int64)
    return PackedRows(source, plan, starts, max_length)


def efficiency(rows: Sequence[PackedRows]) -> float:
    """Share of the rows' positions that hold a token, over all sources (0 to 1)."""
    tokens = sum(int(part.source.lengths[part.plan].sum()) for part in rows)
    return tokens / max(1, sum(len(part) * part.max_length for part in rows))
