"""Log-probabilities of given tokens under hidden states times a vocabulary matrix, only where they are needed.

Both functions gather the positions that a mask keeps and go over them in chunks of C rows, as many chunks as
the mask needs (a loop with a dynamic count), so the work is that of the kept positions, rounded up to C. At no
time does more than one chunk of logits exist, in the forward or the hand-written backward pass:

    peak memory = O(C * V) for the chunk + O(V * D) for the head's gradient + O(N * D) for the hidden states',

which does not depend on N * V. C is chosen so that C * V stays near CHUNK_ELEMENTS (256 MB of float32).

`token_logps` recomputes a chunk's logits in the backward pass: four matrix products per kept position.
`sum_logps` returns only the sum, whose gradient does not depend on what comes after but for one factor, so it
computes the gradient in the forward pass: three products, as in Liger-Kernel (arXiv:2410.10989).

With `vocab_axis` (inside `shard_map`) the head holds this device's share of the rows of V, and the normalizer
is summed over that mesh axis (Megatron-LM, arXiv:1909.08053, section 3); `forward/heads.py` arranges it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.types import Array

CHUNK_ELEMENTS = 1 << 26
MOST_ROWS = 1024
MOST_ROWS_ON_CPU = 256  # what stays in the last cache is faster: 1.3 s against 1.4 s for 2,048 positions


@dataclasses.dataclass(frozen=True)
class Projection:
    """How hidden states become log-probabilities; static.

    Attributes:
      softcap: c * tanh(logits / c); 0 = off.
      temperature: logits are divided by it (after the soft cap).
      chunk: rows per chunk; 0 = chosen from the vocabulary's size.
      vocab_axis: mesh axis over which the head's rows are split; None = whole.
      batch_axes: mesh axes over which the positions are split (then all devices run the same number of chunks).
    """

    softcap: float = 0.0
    temperature: float = 1.0
    chunk: int = 0
    vocab_axis: str | None = None
    batch_axes: tuple[str, ...] = ()


def chunk_rows(positions: int, vocab: int) -> int:
    """Rows per chunk: a power of two near CHUNK_ELEMENTS / V, at most the number of positions."""
    rows = max(64, CHUNK_ELEMENTS // max(vocab, 1))
    rows = 1 << (rows.bit_length() - 1)
    return max(1, min(rows, MOST_ROWS_ON_CPU if jax.default_backend() == "cpu" else MOST_ROWS, positions))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The kept positions first, padded to whole chunks."""

    order: Array
    kept: Array
    chunks: Array
    size: int


def _plan(mask_N: Array, vocab: int, projection: Projection) -> _Plan:
    positions = mask_N.shape[0]
    size = projection.chunk or chunk_rows(positions, vocab)
    padded = -(-positions // size) * size
    order = jnp.argsort(mask_N == 0, stable=True)
    order = jnp.concatenate([order, jnp.full((padded - positions,), positions, order.dtype)])
    count = jnp.sum(mask_N != 0)
    kept = jnp.arange(padded) < count
    chunks = (count + size - 1) // size
    if projection.vocab_axis is not None:
        for axis in projection.batch_axes:
            chunks = jax.lax.pmax(chunks, axis)
    return _Plan(order=order, kept=kept, chunks=chunks, size=size)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One chunk of C positions, `hit_VC` marking each target's row.

    The vocabulary comes first: sums over it then run along rows of C neighbors, which XLA's CPU backend does with
    vector instructions in both threads (16 ms for 1,024 positions, 95 to 350 ms the other way round).
    """

    logits_VC: Array
    hit_VC: Array
    logps_C: Array
    normalizer_C: Array
    is_argmax_C: Array


def _forward_chunk(hidden_CD: Array, head_VD: Array, targets_C: Array, projection: Projection) -> _Chunk:
    logits = jnp.einsum("vd,cd->vc", head_VD, hidden_CD, preferred_element_type=jnp.float32)
    if projection.softcap:
        logits = projection.softcap * jnp.tanh(logits / projection.softcap)
    if projection.temperature != 1.0:
        logits = logits / projection.temperature
    axis = projection.vocab_axis
    first = jax.lax.axis_index(axis) * head_VD.shape[0] if axis is not None else 0
    row = targets_C - first
    inside = (row >= 0) & (row < head_VD.shape[0])
    safe = jnp.clip(row, 0, head_VD.shape[0] - 1)
    target = jnp.where(inside, jnp.take_along_axis(logits, safe[None], axis=0)[0], 0.0)
    largest = jnp.max(logits, axis=0)
    if axis is not None:
        target = jax.lax.psum(target, axis)
        largest = jax.lax.pmax(largest, axis)
    total = jnp.sum(jnp.exp(logits - largest[None]), axis=0)
    if axis is not None:
        total = jax.lax.psum(total, axis)
    normalizer = largest + jnp.log(total)
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) == jnp.where(inside, row, -1)[None]
    return _Chunk(logits, hit, target - normalizer, normalizer, target >= largest)


def _backward_chunk(chunk: _Chunk, weights_C: Array, projection: Projection) -> Array:
    """Gradient of sum_c weights_c * logp_c with respect to the raw products head @ hidden^T, `[V, C]`."""
    probabilities = jnp.exp(chunk.logits_VC - chunk.normalizer_C[None])
    gradient = weights_C[None] * (chunk.hit_VC.astype(jnp.float32) - probabilities)
    if projection.temperature != 1.0:
        gradient = gradient / projection.temperature
    if projection.softcap:
        capped = chunk.logits_VC * projection.temperature / projection.softcap
        gradient = gradient * (1.0 - jnp.square(capped))
    return gradient


def _gather(plan: _Plan, hidden_ND: Array, targets_N: Array) -> tuple[Array, Array]:
    hidden = jnp.take(hidden_ND, plan.order, axis=0, mode="fill", fill_value=0)
    targets = jnp.take(targets_N, plan.order, axis=0, mode="fill", fill_value=0)
    return hidden, targets


def _scatter(plan: _Plan, values: Array, positions: int) -> Array:
    out = jnp.zeros((positions, *values.shape[1:]), values.dtype)
    return out.at[plan.order].set(values, mode="drop", unique_indices=False)


def _slice(values: Array, index: Array, plan: _Plan) -> Array:
    return jax.lax.dynamic_slice_in_dim(values, index * plan.size, plan.size)


def _store(values: Array, part: Array, index: Array, plan: _Plan) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(values, part, index * plan.size, axis=0)


def _int_zero(values: Array) -> np.ndarray:
    return np.zeros(values.shape, jax.dtypes.float0)


def _forward(
    hidden_ND: Array, head_VD: Array, targets_N: Array, mask_N: Array, projection: Projection
) -> tuple[Array, Array, Array]:
    """Per position: log-probability, whether the target is the most likely token, and the normalizer (0 where
    masked)."""
    plan = _plan(mask_N, head_VD.shape[0], projection)
    hidden, targets = _gather(plan, hidden_ND, targets_N)
    head = head_VD.astype(hidden_ND.dtype)

    def body(index: Array, out: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chunk = _forward_chunk(_slice(hidden, index, plan), head, _slice(targets, index, plan), projection)
        keep = _slice(plan.kept, index, plan)

        def kept(part: Array) -> Array:
            return jnp.where(keep, part, 0).astype(jnp.float32)

        logps, is_argmax, normalizer = out
        return (
            _store(logps, kept(chunk.logps_C), index, plan),
            _store(is_argmax, kept(chunk.is_argmax_C), index, plan),
            _store(normalizer, kept(chunk.normalizer_C), index, plan),
        )

    empty = jnp.zeros(plan.kept.shape, jnp.float32)
    logps, is_argmax, normalizer = jax.lax.fori_loop(0, plan.chunks, body, (empty, empty, empty))
    positions = mask_N.shape[0]
    return (
        _scatter(plan, logps, positions),
        _scatter(plan, is_argmax, positions),
        _scatter(plan, normalizer, positions),
    )


def _gradients(
    hidden_ND: Array,
    head_VD: Array,
    targets_N: Array,
    mask_N: Array,
    weights_N: Array,
    projection: Projection,
) -> tuple[Array, Array, Array, Array]:
    """Runs forward and backward chunk by chunk: (logps_N, is_argmax_N, d hidden, d head) of the sum of
    weights_N * logps_N over the kept positions. Gradients are float32."""
    plan = _plan(mask_N, head_VD.shape[0], projection)
    hidden, targets = _gather(plan, hidden_ND, targets_N)
    weights = jnp.take(weights_N.astype(jnp.float32), plan.order, mode="fill", fill_value=0)
    weights = jnp.where(plan.kept, weights, 0.0)
    head = head_VD.astype(hidden_ND.dtype)

    def body(index: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        logps, is_argmax, d_hidden, d_head = carry
        rows = _slice(hidden, index, plan)
        keep = _slice(plan.kept, index, plan)
        chunk = _forward_chunk(rows, head, _slice(targets, index, plan), projection)
        gradient = _backward_chunk(chunk, _slice(weights, index, plan), projection).astype(hidden.dtype)
        d_rows = jnp.einsum("vc,vd->cd", gradient, head, preferred_element_type=jnp.float32)
        if projection.vocab_axis is not None:
            d_rows = jax.lax.psum(d_rows, projection.vocab_axis)
        d_head = d_head + jnp.einsum("vc,cd->vd", gradient, rows, preferred_element_type=jnp.float32)
        return (
            _store(logps, jnp.where(keep, chunk.logps_C, 0.0), index, plan),
            _store(is_argmax, jnp.where(keep, chunk.is_argmax_C, False).astype(jnp.float32), index, plan),
            _store(d_hidden, d_rows, index, plan),
            d_head,
        )

    empty = jnp.zeros(plan.kept.shape, jnp.float32)
    start = (empty, empty, jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head_VD.shape, jnp.float32))
    logps, is_argmax, d_hidden, d_head = jax.lax.fori_loop(0, plan.chunks, body, start)
    positions = mask_N.shape[0]
    return (
        _scatter(plan, logps, positions),
        _scatter(plan, is_argmax, positions),
        _scatter(plan, d_hidden, positions),
        d_head,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_logps(
    hidden_ND: Array, head_VD: Array, targets_N: Array, mask_N: Array, projection: Projection
) -> Array:
    """log softmax(hidden_n head^T)[target_n] for every position with mask 1, float32 `[N]`; 0 where masked.

    Args:
      hidden_ND: final hidden states, compute dtype.
      head_VD: vocabulary projection (cast to the compute dtype; gradient in its own dtype).
      targets_N: int32 token ids.
      mask_N: 1 = the log-probability is needed.
      projection: soft cap, temperature, chunking.
    """
    return _forward(hidden_ND, head_VD, targets_N, mask_N, projection)[0]


def _token_logps_fwd(hidden_ND, head_VD, targets_N, mask_N, projection):
    logps_N = _forward(hidden_ND, head_VD, targets_N, mask_N, projection)[0]
    return logps_N, (hidden_ND, head_VD, targets_N, mask_N)


def _token_logps_bwd(projection, residuals, cotangent_N):
    hidden_ND, head_VD, targets_N, mask_N = residuals
    _, _, d_hidden, d_head = _gradients(hidden_ND, head_VD, targets_N, mask_N, cotangent_N, projection)
    return (
        d_hidden.astype(hidden_ND.dtype),
        d_head.astype(head_VD.dtype),
        _int_zero(targets_N),
        _int_zero(mask_N),
    )


token_logps.defvjp(_token_logps_fwd, _token_logps_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sum_logps(
    hidden_ND: Array, head_VD: Array, targets_N: Array, mask_N: Array, projection: Projection
) -> tuple[Array, Array, Array]:
    """The sum of `token_logps`, with its gradient computed in the same sweep.

    Returns:
      The sum over kept positions (float32 scalar, differentiable), and without gradient: the log-probabilities
      `[N]`, and 1.0 where the target is the most likely token `[N]`.
    """
    logps_N, is_argmax_N, _ = _forward(hidden_ND, head_VD, targets_N, mask_N, projection)
    return jnp.sum(logps_N), logps_N, is_argmax_N


def _sum_logps_fwd(hidden_ND, head_VD, targets_N, mask_N, projection):
    ones_N = jnp.ones(mask_N.shape, jnp.float32)
    logps_N, is_argmax_N, d_hidden, d_head = _gradients(
        hidden_ND, head_VD, targets_N, mask_N, ones_N, projection
    )
    residuals = (d_hidden.astype(hidden_ND.dtype), d_head.astype(head_VD.dtype), targets_N, mask_N)
    return (jnp.sum(logps_N), logps_N, is_argmax_N), residuals


def _sum_logps_bwd(projection, residuals, cotangents):
    d_hidden, d_head, targets_N, mask_N = residuals
    scale = cotangents[0]
    return (
        (scale * d_hidden).astype(d_hidden.dtype),
        (scale * d_head).astype(d_head.dtype),
        _int_zero(targets_N),
        _int_zero(mask_N),
    )


sum_logps.defvjp(_sum_logps_fwd, _sum_logps_bwd)
