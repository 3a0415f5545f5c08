"""Attention over a KV cache: few new queries and many keys that were computed before (`kv_cache.py`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.attention_mask import MASKED_SCORE, AttentionMask, soft_cap
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.kv_cache import PREFILL_BLOCK, append


def append_and_attend(
    q_BTHK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    layer: PyTree,
    index_BT: Array,
    *,
    mask: AttentionMask,
    is_local: Array,
    config: ModelConfig,
) -> tuple[Array, PyTree]:
    """Writes the keys and values of T tokens into a layer of the cache, and attends to all of it."""
    layer = append(layer, k_BTGK, v_BTGK, index_BT)
    k_BGCKJ, v_BGSK = (layer[name].astype(q_BTHK.dtype) for name in ("k", "v"))
    return attend_cache(q_BTHK, k_BGCKJ, v_BGSK, mask=mask, is_local=is_local, config=config), layer


def prefill_and_attend(
    q_BTHK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    cache: PyTree,
    *,
    start: Array,
    is_local: Array,
    config: ModelConfig,
) -> tuple[Array, PyTree]:
    """The same for layer `cache["layer"]` of the prefill cache, whose arrays hold all layers."""
    first = (cache["layer"], 0, start, 0, 0)
    cache = {
        "k": jax.lax.dynamic_update_slice(cache["k"], k_BTGK[None].astype(cache["k"].dtype), first),
        "v": jax.lax.dynamic_update_slice(cache["v"], v_BTGK[None].astype(cache["v"].dtype), first),
        "layer": cache["layer"],
    }
    out_BTHK = attend_prefill(
        q_BTHK,
        cache["k"],
        cache["v"],
        layer=cache["layer"],
        start=start,
        is_local=is_local,
        config=config,
    )
    return out_BTHK, cache


def attend_cache(
    q_BTHK: Array, k_BGCKJ: Array, v_BGSK: Array, *, mask: AttentionMask, is_local: Array, config: ModelConfig
) -> Array:
    """`attention.attend` over one layer of the cache, `[B, T, H, K]`: few queries, many keys.

    Keys lie in blocks with the tokens last and values with the head width last, so that both products read the cache in
    order and nothing is transposed. Heads that share a key head are rows of one product.
    """
    batch, time, heads, width = q_BTHK.shape
    groups, blocks = k_BGCKJ.shape[1:3]
    length = v_BGSK.shape[2]
    q_BGNK = q_BTHK.reshape(batch, time, groups, -1, width).transpose(0, 2, 3, 1, 4)
    q_BGNK = q_BGNK.reshape(batch, groups, -1, width)
    if time == 1:  # one small product a block; for more queries their copies would cost more
        q_BGCNK = jnp.broadcast_to(q_BGNK[:, :, None], (batch, groups, blocks, *q_BGNK.shape[2:]))
        scores = jnp.einsum("bgcnk,bgckj->bgcnj", q_BGCNK, k_BGCKJ, preferred_element_type=jnp.float32)
        scores = scores.transpose(0, 1, 3, 2, 4)
    else:
        scores = jnp.einsum("bgnk,bgckj->bgncj", q_BGNK, k_BGCKJ, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * config.query_scale, config.attn_softcap)
    local = is_local if config.any_local else None
    allowed_BTS = mask.allowed(slice(None), slice(None), local, config.sliding_window)
    scores = scores.reshape(batch, groups, -1, time, length)
    scores = jnp.where(allowed_BTS[:, None, None], scores, MASKED_SCORE)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(batch, groups, -1, length).astype(q_BTHK.dtype)
    out = jnp.einsum("bgns,bgsk->bgnk", weights, v_BGSK, preferred_element_type=jnp.float32)
    out = (out.reshape(batch, groups, -1, time, width) / total).astype(q_BTHK.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)


def attend_prefill(
    q_BTHK: Array,
    k_LBSGK: Array,
    v_LBSGK: Array,
    *,
    layer: Array,
    start: Array,
    is_local: Array,
    config: ModelConfig,
) -> Array:
    """`attention.attend` over one layer of the prefill cache, `[B, T, H, K]`. The queries are those at the indices
    `start` ... `start + T - 1`, whose own keys are written already.

    Reads PREFILL_BLOCK keys at a time up to the last query's, so that the start of a prompt does not pay for the room
    that its end may need; the softmax is corrected from block to block (arXiv:2205.14135, algorithm 1).
    """
    batch, time, heads, width = q_BTHK.shape
    groups = k_LBSGK.shape[3]
    q_BGNK = q_BTHK.reshape(batch, time, groups, -1, width).transpose(0, 2, 3, 1, 4)
    q_BGNK = q_BGNK.reshape(batch, groups, -1, width)
    index_T = start + jnp.arange(time)

    def block_of(array_LBSGK: Array, first: Array) -> Array:
        corner = (layer, 0, first, 0, 0)
        return jax.lax.dynamic_slice(array_LBSGK, corner, (1, batch, PREFILL_BLOCK, groups, width))[0]

    def one_block(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, out = carry
        first = number * PREFILL_BLOCK
        keys = block_of(k_LBSGK, first).astype(q_BTHK.dtype)
        scores = jnp.einsum("bgnk,bjgk->bgnj", q_BGNK, keys, preferred_element_type=jnp.float32)
        scores = soft_cap(scores * config.query_scale, config.attn_softcap)
        gap_TJ = index_T[:, None] - (first + jnp.arange(PREFILL_BLOCK))[None]
        allowed_TJ = gap_TJ >= 0
        if config.any_local:
            allowed_TJ &= jnp.logical_not(is_local) | (gap_TJ < config.sliding_window)
        shape = scores.shape
        scores = scores.reshape(batch, groups, -1, time, PREFILL_BLOCK)
        scores = jnp.where(allowed_TJ[None, None, None], scores, MASKED_SCORE).reshape(shape)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_largest), jnp.exp(largest - new_largest)
        values = block_of(v_LBSGK, first).astype(q_BTHK.dtype)
        weighted_values = jnp.einsum(
            "bgnj,bjgk->bgnk", weights.astype(q_BTHK.dtype), values, preferred_element_type=jnp.float32
        )
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return new_largest, total, out * shrink + weighted_values

    zeros = jnp.zeros((*q_BGNK.shape[:3], 1), jnp.float32)
    carry = (zeros + MASKED_SCORE, zeros, jnp.zeros(q_BGNK.shape, jnp.float32))
    blocks = (start + time - 1) // PREFILL_BLOCK + 1
    _, total, out_BGNK = jax.lax.fori_loop(0, blocks, one_block, carry)
    out = (out_BGNK / total).astype(q_BTHK.dtype).reshape(batch, groups, -1, time, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)
