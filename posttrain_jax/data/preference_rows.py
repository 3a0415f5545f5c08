"""A step's preferences packed into rows, the prompt of each group once and its completions as branches of it.

    tokens     x x x x  x a a a  x b b b b  y y  y c c  y d
    segments   1 1 1 1  1 1 1 1  1 1 1 1 1  2 2  2 2 2  2 2
    branches   0 0 0 0  1 1 1 1  2 2 2 2 2  0 0  3 3 3  4 4
    positions  0 1 2 3  4 5 6 7  4 5 6 7 8  0 1  2 3 4  2 3
    loss mask  0 0 0 0  0 1 1 1  0 1 1 1 1  0 0  0 1 1  0 1

A token of branch b sees branch 0 of its segment and b, so a completion is computed as if it stood alone after the
prompt. Every branch begins with the prompt's last token, which predicts the completion's first; so a target is always
the next token of the row. A step has a fixed number of groups, as papers count their batches; its rows differ in
number from step to step, so the arrays hold as many as could be needed, the empty ones last, and the train step leaves
empty micro-batches out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.packing import best_fit
from posttrain_jax.data.preference_groups import Group, PreferenceData, PreferenceSource

ROW_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static sizes of a step's rows.

    Attributes:
      length: T, tokens in a row.
      completions: N, completions a row can hold.
      comparisons: P, comparisons a row can hold.
      share_prompt: whether completions share their prompt; else each is a sequence with the prompt before it.
    """

    length: int
    completions: int
    comparisons: int
    share_prompt: bool


@dataclasses.dataclass(frozen=True)
class PreferenceRow:
    """A group on its way into a row; `reference_logps` float32 `[K]` (0 where there are none)."""

    group: Group
    reference_logps: np.ndarray


@dataclasses.dataclass(frozen=True)
class PreferenceRows:
    """One source's groups, as the loader takes them.

    Attributes:
      source: the groups.
      shape: of the rows they are packed into.
      reference_logps: float32 `[S]` for all sequences of the source's store, or None.
      reference: what says which model the steps compare with, where they compute its log-probabilities; or "".
    """

    source: PreferenceSource
    shape: RowShape
    reference_logps: np.ndarray | None = None
    reference: str = ""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> PreferenceRow:
        group = self.source.group(i)
        count = len(group.sequences)
        if self.reference_logps is None:
            return PreferenceRow(group, np.zeros(count, np.float32))
        first = group.first_sequence
        return PreferenceRow(group, self.reference_logps[first : first + count])

    def collate(self, rows: Sequence[PreferenceRow | None]) -> dict[str, np.ndarray]:
        """Groups (None = none) packed as the leaves of a `PreferenceBatch`, as many rows as groups."""
        return pack_groups(rows, self.shape)

    @property
    def weight(self) -> float:
        """Share in a mixture."""
        return self.source.weight

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int64, tokens in each prompt with one completion."""
        return self.source.lengths

    def row_id(self, i: int) -> str:
        """ "file:line" of the row that group i came from."""
        return self.source.row_id(i)

    def fingerprint(self) -> bytes:
        """A hash of everything that decides the stream's contents."""
        digest = hashlib.sha256(f"{self.source.store.meta['sha256']} {self.source.weight!r}".encode())
        digest.update(repr(self.shape).encode())
        digest.update(np.ascontiguousarray(self.source.index, np.int64).tobytes())
        if self.reference_logps is not None:
            digest.update(np.ascontiguousarray(self.reference_logps, np.float32).tobytes())
        digest.update(self.reference.encode())
        return digest.digest()


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Preferences to train and to evaluate on, and the rows they are packed into.

    Attributes:
      train, held_out: `held_out` is None where data.eval is "".
      shape: of a step's rows.
      eval_shape: of an evaluation's rows (the same length).
    """

    train: PreferenceData
    held_out: PreferenceData | None
    shape: RowShape
    eval_shape: RowShape

    def train_rows(self, logps: Sequence[np.ndarray] = (), reference: str = "") -> list[PreferenceRows]:
        """The training rows, with the reference's log-probabilities `[S]` of each source where they are known; see
        `PreferenceRows`."""
        return _rows(self.train.sources, self.shape, logps, reference)

    def held_out_rows(self, logps: Sequence[np.ndarray] = (), reference: str = "") -> list[PreferenceRows]:
        """The same of the held-out rows; none without any."""
        return _rows(self.held_out_sources, self.eval_shape, logps, reference)

    @property
    def held_out_sources(self) -> tuple[PreferenceSource, ...]:
        """Those of `held_out`."""
        return () if self.held_out is None else self.held_out.sources


def _rows(
    sources: Sequence[PreferenceSource], shape: RowShape, logps: Sequence[np.ndarray], reference: str
) -> list[PreferenceRows]:
    nothing: list[np.ndarray | None] = [None] * len(sources)
    known = logps or nothing
    return [PreferenceRows(s, shape, one, reference) for s, one in zip(sources, known, strict=True)]


def row_shape(
    data: Sequence[PreferenceData], *, groups: int, length: int = 0, share_prompt: bool = True
) -> RowShape:
    """Sizes that hold every group of `data`, `groups` of them at a time.

    Args:
      data: training and held-out data.
      groups: the most groups that are packed at once.
      length: T; 0 = what the longest group needs, rounded up to a multiple of 128.
      share_prompt: as in RowShape.

    Raises:
      InputError: a group does not fit into `length`.
    """
    sources = [source for part in data for source in part.sources]
    needs = np.concatenate([source.needs(share_prompt=share_prompt) for source in sources])
    kinds = {
        "completions": _per_group(sources, "starts"),
        "comparisons": _per_group(sources, "comparison_starts"),
    }
    longest = int(needs.max())
    if not length:
        length = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    if longest > length:
        at = int(np.argmax(needs))
        for source in sources:
            if at < len(source):
                break
            at -= len(source)
        raise InputError(
            f"{source.row_id(at)} needs {longest} tokens for its completions, more than data.row_length={length}; "
            "raise data.row_length (0 = what the longest needs), or lower data.max_length."
        )
    counts = {
        name: max(1, min(int(each.max()) * groups, int(np.max(length * each // needs))))
        for name, each in kinds.items()
    }
    return RowShape(length=length, share_prompt=share_prompt, **counts)


def _per_group(sources: Sequence[PreferenceSource], name: str) -> np.ndarray:
    starts = {
        "starts": [source.arrays.starts for source in sources],
        "comparison_starts": [source.arrays.comparison_starts for source in sources],
    }[name]
    return np.concatenate([np.diff(s)[source.index] for s, source in zip(starts, sources, strict=True)])


def pack_groups(groups: Sequence[PreferenceRow | None], shape: RowShape) -> dict[str, np.ndarray]:
    """The leaves of a `PreferenceBatch` `[R, ...]` for R groups (None = no group), at most one group a row.

    Best fit, longest first; rows that stay empty come last.
    """
    present = [row for row in groups if row is not None]
    needs = [_need(row.group, shape) for row in present]
    rows, length = len(groups), shape.length
    arrays = {
        name: np.zeros((rows, width), kind)
        for names, width, kind in (
            (("tokens", "loss_mask", "segment_ids", "positions", "branches"), length, np.int32),
            (
                ("last_token_index", "lengths", "sequence_ids", "group_ids", "ranks"),
                shape.completions,
                np.int32,
            ),
            (("ratings", "labels", "reference_logps"), shape.completions, np.float32),
            (("better", "worse"), shape.comparisons, np.int32),
            (("weights", "margins", "probabilities", "shares"), shape.comparisons, np.float32),
        )
        for name in names
    }
    for r, members in enumerate(best_fit(needs, length)):
        place = _Place()
        for number, i in enumerate(members, 1):
            _put_group(arrays, r, place, present[i], number, shape)
    return arrays


@dataclasses.dataclass
class _Place:
    """Where the next group of a row begins: token, segment, completion, comparison."""

    token: int = 0
    segment: int = 0
    completion: int = 0
    comparison: int = 0


def _need(group: Group, shape: RowShape) -> int:
    total = sum(len(encoded.tokens) for encoded in group.sequences)
    return total - (len(group.sequences) - 1) * group.shared if shape.share_prompt else total


def _put_group(
    arrays: dict[str, np.ndarray], r: int, place: _Place, row: PreferenceRow, number: int, shape: RowShape
) -> None:
    group = row.group
    shared = group.shared if shape.share_prompt else 0

    def put(tokens: np.ndarray, mask: np.ndarray, first_position: int, branch: int) -> None:
        span = slice(place.token, place.token + len(tokens))
        arrays["tokens"][r, span] = tokens
        arrays["loss_mask"][r, span] = mask
        arrays["segment_ids"][r, span] = place.segment
        arrays["positions"][r, span] = np.arange(first_position, first_position + len(tokens))
        arrays["branches"][r, span] = branch
        place.token = span.stop

    first = place.completion
    if shape.share_prompt:
        place.segment += 1
        prompt = group.sequences[0]
        put(prompt.tokens[:shared], prompt.loss_mask[:shared], 0, 0)
    for k, encoded in enumerate(group.sequences):
        if not shape.share_prompt:
            place.segment += 1
        slot = place.completion
        put(encoded.tokens[shared:], encoded.loss_mask[shared:], shared, slot + 1)
        arrays["last_token_index"][r, slot] = place.token - 1
        arrays["lengths"][r, slot] = int(encoded.loss_mask.sum())
        arrays["sequence_ids"][r, slot] = group.first_sequence + k + 1
        arrays["group_ids"][r, slot] = number
        arrays["ranks"][r, slot] = group.ranks[k]
        arrays["ratings"][r, slot] = group.ratings[k]
        arrays["labels"][r, slot] = group.labels[k]
        arrays["reference_logps"][r, slot] = row.reference_logps[k]
        place.completion += 1
    completions = len(group.sequences)
    possible = max(1, completions * (completions - 1) // 2)
    for c in group.comparisons:
        slot = place.comparison
        arrays["better"][r, slot], arrays["worse"][r, slot] = first + c.better, first + c.worse
        arrays["weights"][r, slot] = c.weight
        arrays["margins"][r, slot] = c.margin
        arrays["probabilities"][r, slot] = c.probability
        arrays["shares"][r, slot] = 1.0 / possible
        place.comparison += 1
