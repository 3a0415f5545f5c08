"""Attention on CPUs: over packed rows, and only over the blocks of keys that a block of queries can see.

In a packed row a query sees its own sequence alone, so most of the (T, T) scores are masked. For every row and every
block of queries, a loop goes over the blocks of keys from the one where the first query's sequence begins (or the
window reaches) to the diagonal, with the running softmax of FlashAttention (arXiv:2205.14135, algorithm 1). Memory
is O(T K); the work is that of the sequences, not of the row. The backward pass is written by hand (section B.2).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.sharding import BATCH_AXES, ambient_mesh, tensor_axis
from posttrain_jax.core.types import Array
from posttrain_jax.models.attention_mask import MASKED_SCORE, AttentionMask, soft_cap
from posttrain_jax.models.config import ModelConfig

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class BlockRule:
    """What is the same for every block.

    Attributes:
      scale: scores are multiplied by it.
      softcap: c * tanh(scores / c); 0 = off.
    """

    scale: float
    softcap: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Where each token of a packed row belongs, int32 `[B, T]` each.

    Attributes:
      segments: 0 = padding; a segment is one run of equal ids.
      positions: of a token in its sequence; 0 at the start of a segment.
      branches: a token of branch b sees branch 0 and b of its segment; None = there are none, and positions count up.
    """

    segments: Array
    positions: Array
    branches: Array | None = None


def attend_blocks(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: AttentionMask, is_local: Array, config: ModelConfig
) -> Array:
    """`block_attention`, on each device's own rows and heads."""
    time = q_BTHK.shape[1]
    window = jnp.asarray(time, jnp.int32)
    if config.any_local:
        window = jnp.where(is_local, jnp.int32(config.sliding_window), window)
    rule = BlockRule(scale=config.query_scale, softcap=config.attn_softcap)
    kernel = functools.partial(block_attention, rule=rule)
    mesh = ambient_mesh()
    if mesh is not None:
        rows = P(BATCH_AXES, None, tensor_axis(config.n_kv_heads, mesh), None)
        kernel = jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(rows, rows, rows, P(BATCH_AXES, None), P()),
            out_specs=rows,
            check_vma=False,
        )
    layout = RowLayout(mask.query_segments_BT, mask.query_positions_BT, mask.branches_BT)
    return kernel(q_BTHK, k_BSGK, v_BSGK, layout, window)


def block_attention(
    q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, layout: RowLayout, window: Array, rule: BlockRule
) -> Array:
    """Causal attention within segments, `[B, T, H, K]`; T must be a multiple of BLOCK.

    Args:
      q_BTHK, k_BTGK, v_BTGK: H a multiple of G.
      layout: who may see whom.
      window: scalar int32: how many latest tokens a query sees, itself included; T or more = all.
      rule: scale and soft cap.
    """
    batch, time, heads, width = q_BTHK.shape
    groups = k_BTGK.shape[2]
    q_BGMTK = q_BTHK.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    out_BGMTK = _attention(
        q_BGMTK, k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3), layout, window, rule
    )
    return out_BGMTK.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)


def first_key_blocks(layout: RowLayout, window: Array) -> Array:
    """For each row and block of queries, the first block of keys that any of its queries can see, `[B, n]`.

    With branches the window counts positions, and a prompt's positions begin where its segment does.
    """
    segments_BT = layout.segments
    batch, time = segments_BT.shape
    index_T = jnp.arange(time, dtype=jnp.int32)
    changes_BT = jnp.concatenate(
        [jnp.ones((batch, 1), bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1
    )
    starts_BT = jax.lax.cummax(jnp.where(changes_BT, index_T[None, :], 0), axis=1)
    if layout.branches is None:
        first_BT = jnp.maximum(starts_BT, index_T[None, :] - window + 1)
        return first_BT[:, ::BLOCK] // BLOCK
    first_BT = starts_BT + jnp.maximum(0, layout.positions - window + 1)
    return jnp.min(first_BT.reshape(batch, -1, BLOCK), axis=2) // BLOCK


def _part(x: Array, row: Array, block: Array, axis: int) -> Array:
    """One block of one row along `axis`, without the batch axis."""
    start: list[int | Array] = [0] * x.ndim
    sizes = list(x.shape)
    start[0], sizes[0] = row, 1
    start[axis], sizes[axis] = block * BLOCK, BLOCK
    return jax.lax.dynamic_slice(x, start, sizes)[0]


def _put(x: Array, part: Array, row: Array, block: Array, axis: int) -> Array:
    start: list[int | Array] = [0] * x.ndim
    start[0], start[axis] = row, block * BLOCK
    return jax.lax.dynamic_update_slice(x, part[None].astype(x.dtype), start)


def _scores(q_GNK: Array, k_GSK: Array, rule: BlockRule) -> Array:
    """Scaled and capped scores before the mask, `[G, M, t, s]` float32."""
    scores = jnp.einsum("gnk,gsk->gns", q_GNK, k_GSK, preferred_element_type=jnp.float32)
    return soft_cap(scores * rule.scale, rule.softcap).reshape(q_GNK.shape[0], -1, BLOCK, BLOCK)


def _mask(layout: RowLayout, window: Array, row: Array, queries: Array, keys: Array) -> Array:
    """Who sees whom between two blocks, `[1, 1, t, s]`."""

    def parts(values_BT: Array) -> tuple[Array, Array]:
        return _part(values_BT, row, queries, 1)[:, None], _part(values_BT, row, keys, 1)[None, :]

    offset = jnp.arange(BLOCK, dtype=jnp.int32)
    gap = (queries * BLOCK + offset)[:, None] - (keys * BLOCK + offset)[None, :]
    query_segments, key_segments = parts(layout.segments)
    allowed = (query_segments == key_segments) & (gap >= 0)
    if layout.branches is not None:
        query_branches, key_branches = parts(layout.branches)
        allowed &= (key_branches == 0) | (key_branches == query_branches)
        query_positions, key_positions = parts(layout.positions)
        gap = query_positions - key_positions
    return (allowed & (gap < window))[None, None]


def _rows(x_GMtK: Array) -> Array:
    groups, _, _, width = x_GMtK.shape
    return x_GMtK.reshape(groups, -1, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q_BGMTK: Array, k_BGTK: Array, v_BGTK: Array, layout: RowLayout, window: Array, rule: BlockRule
) -> Array:
    return _forward(q_BGMTK, k_BGTK, v_BGTK, layout, window, rule)[0]


def _forward(q_BGMTK, k_BGTK, v_BGTK, layout, window, rule):
    batch, groups, shared, time, width = q_BGMTK.shape
    blocks = time // BLOCK
    first_Bn = first_key_blocks(layout, window)

    def query_block(number: Array, outs: tuple[Array, Array]) -> tuple[Array, Array]:
        row, i = number // blocks, number % blocks
        q = _rows(_part(q_BGMTK, row, i, 3))

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, weighted = carry
            scores = _scores(q, _part(k_BGTK, row, j, 2), rule)
            allowed = _mask(layout, window, row, i, j)
            scores = jnp.where(allowed, scores, MASKED_SCORE)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.where(allowed, jnp.exp(scores - new_largest[..., None]), 0.0)
            shrink = jnp.exp(largest - new_largest)
            flat = weights.reshape(groups, -1, BLOCK).astype(q.dtype)
            part = jnp.einsum(
                "gns,gsk->gnk", flat, _part(v_BGTK, row, j, 2), preferred_element_type=jnp.float32
            )
            weighted = weighted * shrink[..., None] + part.reshape(groups, shared, BLOCK, width)
            return new_largest, total * shrink + jnp.sum(weights, axis=-1), weighted

        flat_shape = (groups, shared, BLOCK)
        start = (
            jnp.full(flat_shape, MASKED_SCORE, jnp.float32),
            jnp.zeros(flat_shape, jnp.float32),
            jnp.zeros((*flat_shape, width), jnp.float32),
        )
        largest, total, weighted = jax.lax.fori_loop(first_Bn[row, i], i + 1, key_block, start)
        out = weighted / total[..., None]
        return _put(outs[0], out, row, i, 3), _put(outs[1], largest + jnp.log(total), row, i, 3)

    empty = (jnp.zeros(q_BGMTK.shape, q_BGMTK.dtype), jnp.zeros(q_BGMTK.shape[:4], jnp.float32))
    out_BGMTK, normalizer_BGMT = jax.lax.fori_loop(0, batch * blocks, query_block, empty)
    out_BGMTK = checkpoint_name(out_BGMTK, "attention_out")
    normalizer_BGMT = checkpoint_name(normalizer_BGMT, "attention_normalizer")
    return out_BGMTK, (q_BGMTK, k_BGTK, v_BGTK, layout, window, out_BGMTK, normalizer_BGMT)


def _backward(rule, residuals, d_out_BGMTK):
    q_BGMTK, k_BGTK, v_BGTK, layout, window, out_BGMTK, normalizer_BGMT = residuals
    batch, groups, shared, time, width = q_BGMTK.shape
    blocks, dtype = time // BLOCK, q_BGMTK.dtype
    first_Bn = first_key_blocks(layout, window)
    delta_BGMT = jnp.sum(d_out_BGMTK.astype(jnp.float32) * out_BGMTK.astype(jnp.float32), axis=-1)

    def query_block(number: Array, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row, i = number // blocks, number % blocks
        d_q, d_k, d_v = gradients
        q, d_out = _rows(_part(q_BGMTK, row, i, 3)), _rows(_part(d_out_BGMTK, row, i, 3))
        normalizer = _part(normalizer_BGMT, row, i, 3)[..., None]
        delta = _part(delta_BGMT, row, i, 3)[..., None]

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q_block, d_k, d_v = carry
            keys, values = _part(k_BGTK, row, j, 2), _part(v_BGTK, row, j, 2)
            scores = _scores(q, keys, rule)
            weights = jnp.where(_mask(layout, window, row, i, j), jnp.exp(scores - normalizer), 0.0)
            d_weights = jnp.einsum("gnk,gsk->gns", d_out, values, preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights.reshape(weights.shape) - delta)
            if rule.softcap:
                d_scores = d_scores * (1.0 - jnp.square(scores / rule.softcap))
            d_scores = (d_scores * rule.scale).reshape(groups, -1, BLOCK).astype(dtype)
            flat = weights.reshape(groups, -1, BLOCK).astype(dtype)
            d_q_block += jnp.einsum("gns,gsk->gnk", d_scores, keys, preferred_element_type=jnp.float32)
            d_keys = jnp.einsum("gns,gnk->gsk", d_scores, q, preferred_element_type=jnp.float32)
            d_values = jnp.einsum("gns,gnk->gsk", flat, d_out, preferred_element_type=jnp.float32)
            d_k = _put(d_k, _part(d_k, row, j, 2) + d_keys, row, j, 2)
            d_v = _put(d_v, _part(d_v, row, j, 2) + d_values, row, j, 2)
            return d_q_block, d_k, d_v

        zero = jnp.zeros((groups, shared * BLOCK, width), jnp.float32)
        d_q_block, d_k, d_v = jax.lax.fori_loop(first_Bn[row, i], i + 1, key_block, (zero, d_k, d_v))
        return _put(d_q, d_q_block.reshape(groups, shared, BLOCK, width), row, i, 3), d_k, d_v

    empty = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BGMTK, k_BGTK, v_BGTK))
    d_q, d_k, d_v = jax.lax.fori_loop(0, batch * blocks, query_block, empty)
    no_gradient = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), (layout, window))
    return (d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype), *no_gradient)


_attention.defvjp(_forward, _backward)
