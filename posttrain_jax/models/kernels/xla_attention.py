"""Attention in plain matrix products, with a backward pass written by hand. For every backend and every mask."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core.types import Array
from posttrain_jax.models.attention_mask import MASKED_SCORE, AttentionMask, soft_cap
from posttrain_jax.models.config import ModelConfig

QUERY_BLOCK = 256


def attend_xla(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: AttentionMask, is_local: Array, config: ModelConfig
) -> Array:
    """Plain matrix products, a block of queries at a time; keys after the block's last query are not read.

    The heads that share a key head are stacked along the query axis, so each product is one large matrix. The
    backward pass is written by hand: it keeps q, k, v, the output and the softmax's normalizer, and computes
    the weights again block by block (as FlashAttention does, arXiv:2205.14135, section 3.1).
    """
    batch, time, heads, width = q_BTHK.shape
    groups = k_BSGK.shape[2]
    q_BGMTK = q_BTHK.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    local = is_local if config.any_local else None
    rule = _ScoreRule(
        scale=config.query_scale,
        softcap=config.attn_softcap,
        window=config.sliding_window,
    )
    out_BGMTK = _blockwise(
        q_BGMTK, k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3), mask, local, rule
    )
    return out_BGMTK.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)


@dataclasses.dataclass(frozen=True)
class _ScoreRule:
    scale: float
    softcap: float
    window: int


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block of t queries (of M heads each) against the first s keys."""

    start: int
    stop: int
    last_key: int


def _blocks(time: int, keys: int, packed: bool) -> list[_Block]:
    starts = range(0, time, QUERY_BLOCK)
    stops = [min(start + QUERY_BLOCK, time) for start in starts]
    return [_Block(a, b, b if packed else keys) for a, b in zip(starts, stops, strict=True)]


def _rows(x_BGMTK: Array, block: _Block) -> Array:
    """The block's queries as one matrix per key head, `[B, G, M * t, K]`."""
    batch, groups, shared, _, width = x_BGMTK.shape
    part = x_BGMTK[:, :, :, block.start : block.stop]
    return part.reshape(batch, groups, shared * (block.stop - block.start), width)


def _capped_scores(
    q_BGNK: Array, k_BGSK: Array, block: _Block, mask: AttentionMask, local: Array | None, rule: _ScoreRule
) -> tuple[Array, Array]:
    """Scores after scale and soft cap, before the mask, and the mask: both `[B, G, M, t, s]`-broadcastable."""
    keys = k_BGSK[:, :, : block.last_key]
    scores = jnp.einsum("bgnk,bgsk->bgns", q_BGNK, keys, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * rule.scale, rule.softcap)
    allowed = mask.allowed(slice(block.start, block.stop), slice(0, block.last_key), local, rule.window)
    batch, groups = scores.shape[:2]
    scores = scores.reshape(batch, groups, -1, block.stop - block.start, block.last_key)
    return scores, allowed[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(
    q_BGMTK: Array, k_BGSK: Array, v_BGSK: Array, mask: AttentionMask, local: Array | None, rule: _ScoreRule
) -> Array:
    return _blockwise_fwd(q_BGMTK, k_BGSK, v_BGSK, mask, local, rule)[0]


def _blockwise_fwd(q_BGMTK, k_BGSK, v_BGSK, mask, local, rule):
    shape = q_BGMTK.shape
    outs, normalizers = [], []
    for block in _blocks(shape[3], k_BGSK.shape[2], mask.packed):
        q = _rows(q_BGMTK, block)
        scores, allowed = _capped_scores(q, k_BGSK, block, mask, local, rule)
        scores = jnp.where(allowed, scores, MASKED_SCORE)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.reshape(*q.shape[:3], -1).astype(q.dtype)
        values = v_BGSK[:, :, : block.last_key]
        out = jnp.einsum("bgns,bgsk->bgnk", weights, values, preferred_element_type=jnp.float32)
        outs.append((out.reshape(*shape[:3], -1, shape[4]) / total).astype(q.dtype))
        normalizers.append((largest + jnp.log(total))[..., 0])
    out_BGMTK = checkpoint_name(jnp.concatenate(outs, axis=3), "attention_out")
    normalizer_BGMT = checkpoint_name(jnp.concatenate(normalizers, axis=3), "attention_normalizer")
    return out_BGMTK, (q_BGMTK, k_BGSK, v_BGSK, mask, local, out_BGMTK, normalizer_BGMT)


def _blockwise_bwd(rule, residuals, d_out_BGMTK):
    q_BGMTK, k_BGSK, v_BGSK, mask, local, out_BGMTK, normalizer_BGMT = residuals
    dtype, shape = q_BGMTK.dtype, q_BGMTK.shape
    delta_BGMT = jnp.sum(d_out_BGMTK.astype(jnp.float32) * out_BGMTK.astype(jnp.float32), axis=-1)
    d_q = []
    d_k = jnp.zeros(k_BGSK.shape, jnp.float32)
    d_v = jnp.zeros(v_BGSK.shape, jnp.float32)
    for block in _blocks(shape[3], k_BGSK.shape[2], mask.packed):
        span = slice(block.start, block.stop)
        q, d_out = _rows(q_BGMTK, block), _rows(d_out_BGMTK, block)
        keys, values = k_BGSK[:, :, : block.last_key], v_BGSK[:, :, : block.last_key]
        scores, allowed = _capped_scores(q, k_BGSK, block, mask, local, rule)
        weights = jnp.where(allowed, jnp.exp(scores - normalizer_BGMT[:, :, :, span, None]), 0.0)
        flat = weights.reshape(*q.shape[:3], -1).astype(dtype)
        d_weights = jnp.einsum("bgnk,bgsk->bgns", d_out, values, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights.reshape(weights.shape) - delta_BGMT[:, :, :, span, None])
        if rule.softcap:
            d_scores = d_scores * (1.0 - jnp.square(scores / rule.softcap))
        d_scores = (d_scores * rule.scale).reshape(flat.shape).astype(dtype)
        part = jnp.einsum("bgns,bgsk->bgnk", d_scores, keys, preferred_element_type=jnp.float32)
        d_q.append(part.reshape(*shape[:3], -1, shape[4]))
        d_k = d_k.at[:, :, : block.last_key].add(
            jnp.einsum("bgns,bgnk->bgsk", d_scores, q, preferred_element_type=jnp.float32)
        )
        d_v = d_v.at[:, :, : block.last_key].add(
            jnp.einsum("bgns,bgnk->bgsk", flat, d_out, preferred_element_type=jnp.float32)
        )
    no_gradient = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), (mask, local))
    return (jnp.concatenate(d_q, axis=3).astype(dtype), d_k.astype(dtype), d_v.astype(dtype), *no_gradient)


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
