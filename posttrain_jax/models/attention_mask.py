"""Which keys a query may attend to, as a rule instead of an array."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array

MASKED_SCORE = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A mask as a rule: no (B, T, S) array exists before an implementation needs a block of it.

    A query at (segment s, order o, position p) sees a key at (s', o', p') when s == s' and o' <= o, and in a local
    layer also p - p' < window. In packed rows the order is the index in the row, and positions restart with every
    segment; in a cache the order is the position, and an empty entry has a segment of its own. Where a segment has
    branches (completions of one prompt), a query of branch b sees branch 0 (the prompt) and b, not the others.

    Attributes:
      query_segments_BT, key_segments_BS: int32.
      query_order_BT, key_order_BS: int32.
      query_positions_BT, key_positions_BS: int32.
      packed: keys are the queries' own row, in order (no cache).
      branches_BT: int32, of packed rows; None = every segment is one sequence.
    """

    query_segments_BT: Array
    key_segments_BS: Array
    query_order_BT: Array
    key_order_BS: Array
    query_positions_BT: Array
    key_positions_BS: Array
    packed: bool = dataclasses.field(metadata={"static": True})
    branches_BT: Array | None = None

    @classmethod
    def packed_rows(
        cls, segment_ids_BT: Array, positions_BT: Array, branches_BT: Array | None = None
    ) -> AttentionMask:
        """Causal attention within each segment of a row (and within its branches)."""
        order_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1])[None, :], segment_ids_BT.shape)
        return cls(
            segment_ids_BT,
            segment_ids_BT,
            order_BT,
            order_BT,
            positions_BT,
            positions_BT,
            packed=True,
            branches_BT=branches_BT,
        )

    @classmethod
    def cached(cls, positions_BT: Array, cache_positions_BS: Array) -> AttentionMask:
        """Causal attention by position over a cache whose empty entries have position -1."""
        return cls(
            jnp.ones_like(positions_BT),
            (cache_positions_BS >= 0).astype(jnp.int32),
            positions_BT,
            cache_positions_BS,
            positions_BT,
            cache_positions_BS,
            packed=False,
        )

    def allowed(self, queries: slice, keys: slice, is_local: Array | None, window: int) -> Array:
        """The mask of a block of queries and keys, `[B, t, s]` bool; `is_local` None = no local layers."""
        allowed = self.query_segments_BT[:, queries, None] == self.key_segments_BS[:, None, keys]
        allowed &= self.query_order_BT[:, queries, None] >= self.key_order_BS[:, None, keys]
        if self.branches_BT is not None:
            key_branches = self.branches_BT[:, None, keys]
            allowed &= (key_branches == 0) | (key_branches == self.branches_BT[:, queries, None])
        if is_local is not None:
            gap = self.query_positions_BT[:, queries, None] - self.key_positions_BS[:, None, keys]
            allowed &= jnp.logical_not(is_local) | (gap < window)
        return allowed


def soft_cap(scores: Array, cap: float) -> Array:
    """cap * tanh(scores / cap) (Gemma 2, arXiv:2408.00118); `cap` 0 = off."""
    return cap * jnp.tanh(scores / cap) if cap else scores
