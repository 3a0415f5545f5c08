"""Who may attend to whom, and four implementations of attention under that mask: xla, blocks, cudnn, splash."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import BATCH_AXES, ambient_mesh
from posttrain_jax.core.types import Array
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.kernels.block_attention import BLOCK, BlockRule, RowPlaces, block_attention
from posttrain_jax.models.kv_cache import PREFILL_BLOCK

IMPLEMENTATIONS = ("xla", "blocks", "cudnn", "splash")
QUERY_BLOCK = 256
SPLASH_LANES = 128
MASKED_SCORE = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A mask by rule, so that no (B, T, S) array exists before an implementation needs its block of one.

    A query at (segment s, order o, position p) sees a key at (s', o', p') when s == s' and o' <= o, and in a
    local layer p - p' < window too. In packed rows the order is the index in the row and positions restart;
    in a cache the order is the position and an empty place has a segment of its own. Where a segment has branches
    (completions of one prompt), a query of branch b sees branch 0 (the prompt) and b, not the others.

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
        """Causal attention by position over a cache whose empty places have position -1."""
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


def default_implementation(config: ModelConfig, dtype: str) -> str:
    """Splash on TPU; cuDNN on GPU where it can (bfloat16, no soft cap, heads up to 128), else XLA; blocks on CPU."""
    platform = jax.default_backend()
    if platform == "tpu":
        return "splash"
    if platform == "gpu" and dtype == "bfloat16" and not config.attn_softcap and config.head_dim <= 128:
        return "cudnn"
    return "blocks" if platform == "cpu" else "xla"


def attend(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    *,
    mask: AttentionMask,
    is_local: Array,
    config: ModelConfig,
    implementation: str,
) -> Array:
    """softmax(query_scale * q k^T, soft-capped, masked) v, `[B, T, H, K]`.

    Softmax in float32. `is_local` is a scalar bool array: whether this (scanned) layer uses the window. Splash and
    blocks work on packed rows of a multiple of 128 tokens, as many of them as the mesh divides; elsewhere (with a
    cache, for a prompt's odd length, a single row on many devices) XLA takes their place.
    """
    if implementation == "cudnn":
        return _attend_cudnn(q_BTHK, k_BSGK, v_BSGK, mask, is_local, config)
    rows, time = q_BTHK.shape[:2]
    if mask.packed and _split_evenly(rows):
        if implementation == "splash" and time % SPLASH_LANES == 0:
            return _attend_splash(q_BTHK, k_BSGK, v_BSGK, mask, is_local, config)
        if implementation == "blocks" and time % BLOCK == 0:
            return _attend_blocks(q_BTHK, k_BSGK, v_BSGK, mask, is_local, config)
    return _attend_xla(q_BTHK, k_BSGK, v_BSGK, mask, is_local, config)


def _split_evenly(rows: int) -> bool:
    """Whether the mesh's data and fsdp axes divide the rows, as `shard_map` needs it."""
    mesh = ambient_mesh()
    return mesh is None or rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


def attend_cache(
    q_BTHK: Array, k_BGCKJ: Array, v_BGSK: Array, *, mask: AttentionMask, is_local: Array, config: ModelConfig
) -> Array:
    """The same function over a layer's cache (`kv_cache.py`), `[B, T, H, K]`: few queries, many keys.

    Keys lie in blocks with their places last and values with their width last, so that both products read the cache in
    order and nothing is transposed. Heads that share a key head are rows of one product.
    """
    batch, time, heads, width = q_BTHK.shape
    groups, blocks = k_BGCKJ.shape[1:3]
    places = v_BGSK.shape[2]
    q_BGNK = q_BTHK.reshape(batch, time, groups, -1, width).transpose(0, 2, 3, 1, 4)
    q_BGNK = q_BGNK.reshape(batch, groups, -1, width)
    if time == 1:  # one small product a block; for more queries their copies would cost more
        q_BGCNK = jnp.broadcast_to(q_BGNK[:, :, None], (batch, groups, blocks, *q_BGNK.shape[2:]))
        scores = jnp.einsum("bgcnk,bgckj->bgcnj", q_BGCNK, k_BGCKJ, preferred_element_type=jnp.float32)
        scores = scores.transpose(0, 1, 3, 2, 4)
    else:
        scores = jnp.einsum("bgnk,bgckj->bgncj", q_BGNK, k_BGCKJ, preferred_element_type=jnp.float32)
    scores = scores * config.query_scale
    if config.attn_softcap:
        scores = config.attn_softcap * jnp.tanh(scores / config.attn_softcap)
    local = is_local if config.any_local else None
    allowed_BTS = mask.allowed(slice(None), slice(None), local, config.sliding_window)
    scores = scores.reshape(batch, groups, -1, time, places)
    scores = jnp.where(allowed_BTS[:, None, None], scores, MASKED_SCORE)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(batch, groups, -1, places).astype(q_BTHK.dtype)
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
    """The same function over one layer of the prefill cache (`kv_cache.init_prefill_cache`), `[B, T, H, K]`. The queries
    are those at the indices `start` ... `start + T - 1`, whose own keys are written already.

    Reads PREFILL_BLOCK keys at a time up to the last query's, so that the start of a prompt does not pay for the room
    that its end may need; the softmax is corrected from block to block (arXiv:2205.14135, algorithm 1).
    """
    batch, time, heads, width = q_BTHK.shape
    groups = k_LBSGK.shape[3]
    q_BGNK = q_BTHK.reshape(batch, time, groups, -1, width).transpose(0, 2, 3, 1, 4)
    q_BGNK = q_BGNK.reshape(batch, groups, -1, width)
    place_T = start + jnp.arange(time)

    def block_of(array_LBSGK: Array, first: Array) -> Array:
        at = (layer, 0, first, 0, 0)
        return jax.lax.dynamic_slice(array_LBSGK, at, (1, batch, PREFILL_BLOCK, groups, width))[0]

    def one_block(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        first = number * PREFILL_BLOCK
        keys = block_of(k_LBSGK, first).astype(q_BTHK.dtype)
        scores = jnp.einsum("bgnk,bjgk->bgnj", q_BGNK, keys, preferred_element_type=jnp.float32)
        scores = scores * config.query_scale
        if config.attn_softcap:
            scores = config.attn_softcap * jnp.tanh(scores / config.attn_softcap)
        gap_TJ = place_T[:, None] - (first + jnp.arange(PREFILL_BLOCK))[None]
        allowed_TJ = gap_TJ >= 0
        if config.any_local:
            allowed_TJ &= jnp.logical_not(is_local) | (gap_TJ < config.sliding_window)
        shape = scores.shape
        scores = scores.reshape(batch, groups, -1, time, PREFILL_BLOCK)
        scores = jnp.where(allowed_TJ[None, None, None], scores, MASKED_SCORE).reshape(shape)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        values = block_of(v_LBSGK, first).astype(q_BTHK.dtype)
        more = jnp.einsum(
            "bgnj,bjgk->bgnk", weights.astype(q_BTHK.dtype), values, preferred_element_type=jnp.float32
        )
        total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
        return new_top, total, out * kept + more

    nothing = jnp.zeros((*q_BGNK.shape[:3], 1), jnp.float32)
    carry = (nothing + MASKED_SCORE, nothing, jnp.zeros(q_BGNK.shape, jnp.float32))
    blocks = (start + time - 1) // PREFILL_BLOCK + 1
    _, total, out_BGNK = jax.lax.fori_loop(0, blocks, one_block, carry)
    out = (out_BGNK / total).astype(q_BTHK.dtype).reshape(batch, groups, -1, time, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)


def _attend_xla(
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
    rule = _BlockRule(
        scale=config.query_scale,
        softcap=config.attn_softcap,
        window=config.sliding_window,
    )
    out_BGMTK = _blockwise(
        q_BGMTK, k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3), mask, local, rule
    )
    return out_BGMTK.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)


@dataclasses.dataclass(frozen=True)
class _BlockRule:
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
    q_BGNK: Array, k_BGSK: Array, block: _Block, mask: AttentionMask, local: Array | None, rule: _BlockRule
) -> tuple[Array, Array]:
    """Scores after scale and soft cap, before the mask, and the mask: both `[B, G, M, t, s]`-broadcastable."""
    keys = k_BGSK[:, :, : block.last_key]
    scores = jnp.einsum("bgnk,bgsk->bgns", q_BGNK, keys, preferred_element_type=jnp.float32) * rule.scale
    if rule.softcap:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    allowed = mask.allowed(slice(block.start, block.stop), slice(0, block.last_key), local, rule.window)
    batch, groups = scores.shape[:2]
    scores = scores.reshape(batch, groups, -1, block.stop - block.start, block.last_key)
    return scores, allowed[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(
    q_BGMTK: Array, k_BGSK: Array, v_BGSK: Array, mask: AttentionMask, local: Array | None, rule: _BlockRule
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


def _attend_blocks(
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
        rows = P(BATCH_AXES, None, _head_axis(mesh, config), None)
        kernel = jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(rows, rows, rows, P(BATCH_AXES, None), P()),
            out_specs=rows,
            check_vma=False,
        )
    places = RowPlaces(mask.query_segments_BT, mask.query_positions_BT, mask.branches_BT)
    return kernel(q_BTHK, k_BSGK, v_BSGK, places, window)


def _head_axis(mesh: AbstractMesh, config: ModelConfig) -> str | None:
    """The tensor axis where it divides the key heads, else None: every device computes all heads."""
    return "tensor" if config.n_kv_heads % mesh.shape["tensor"] == 0 else None


def _attend_cudnn(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: AttentionMask, is_local: Array, config: ModelConfig
) -> Array:
    """cuDNN's fused attention through `jax.nn`; 16-bit floats, no soft cap."""
    if config.attn_softcap:
        raise InputError(
            f"model.attention=cudnn cannot soft-cap scores, which {config.model_type} needs; use xla."
        )
    local = is_local if config.any_local else None
    allowed = mask.allowed(slice(None), slice(None), local, config.sliding_window)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, mask=allowed[:, None], scale=config.query_scale, implementation="cudnn"
    )


def _attend_splash(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: AttentionMask,
    is_local: Array,
    config: ModelConfig,
    *,
    interpret: bool = False,
) -> Array:
    """Pallas splash attention for TPU: blocks that the causal or local mask empties are never computed.

    Its window counts places in the row, which equals positions inside one packed segment. Head widths that
    are no multiple of the TPU's 128 lanes are padded with zeros.
    """
    time, width = q_BTHK.shape[1], q_BTHK.shape[3]
    if mask.branches_BT is not None:
        raise InputError(
            "model.attention=splash cannot share a prompt between completions; set data.share_prompt=no, or "
            "model.attention=xla."
        )
    if time % SPLASH_LANES:
        raise InputError(
            f"model.attention=splash needs rows of a multiple of {SPLASH_LANES} tokens, but they have {time}; "
            "change data.max_length or use model.attention=xla."
        )
    padding = [(0, 0), (0, 0), (0, 0), (0, -width % SPLASH_LANES)]
    q_BHTK = jnp.pad(q_BTHK * config.query_scale, padding).transpose(0, 2, 1, 3)
    k_BGSK = jnp.pad(k_BSGK, padding).transpose(0, 2, 1, 3)
    v_BGSK = jnp.pad(v_BSGK, padding).transpose(0, 2, 1, 3)

    def run(window: int):
        kernel = functools.partial(
            _splash_rows, window=window, softcap=config.attn_softcap, interpret=interpret
        )
        mesh = ambient_mesh()
        if mesh is not None:
            rows = P(BATCH_AXES, _head_axis(mesh, config), None, None)
            kernel = jax.shard_map(
                kernel,
                mesh=mesh,
                in_specs=(rows, rows, rows, P(BATCH_AXES, None)),
                out_specs=rows,
                check_vma=False,
            )
        return lambda: kernel(q_BHTK, k_BGSK, v_BGSK, mask.query_segments_BT)

    if not config.any_local:
        out_BHTK = run(0)()
    elif not config.any_global:
        out_BHTK = run(config.sliding_window)()
    else:
        out_BHTK = jax.lax.cond(is_local, run(config.sliding_window), run(0))
    return out_BHTK.transpose(0, 2, 1, 3)[..., :width]


def _splash_rows(
    q_BHTK: Array,
    k_BGSK: Array,
    v_BGSK: Array,
    segments_BT: Array,
    *,
    window: int,
    softcap: float,
    interpret: bool,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, time = q_BHTK.shape[1:3]
    shape = (time, time)
    rule = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    block = next(size for size in (512, 256, 128) if time % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([rule] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(
        q_BHTK, k_BGSK, v_BGSK, segments_BT
    )
