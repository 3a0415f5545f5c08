"""From hidden states to log-probabilities of given tokens, on any mesh.

The arithmetic is `losses/logprobs.py`; here the rows that each device holds are handed to it inside
`shard_map`, with the vocabulary split over the tensor axis where it divides evenly.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.masking import shift_left
from posttrain_jax.core.sharding import BATCH_AXES, ambient_mesh
from posttrain_jax.core.types import Array, PreferenceBatch
from posttrain_jax.losses import logprobs
from posttrain_jax.losses.logprobs import Projection


def token_logps(
    hidden_BTD: Array, head_VD: Array, targets_BT: Array, mask_BT: Array, projection: Projection
) -> Array:
    """`losses.logprobs.token_logps` for rows, `[B, T]` float32, 0 where masked; differentiable."""
    if ambient_mesh() is None:
        width = hidden_BTD.shape[-1]
        logps_N = logprobs.token_logps(
            hidden_BTD.reshape(-1, width), head_VD, targets_BT.reshape(-1), mask_BT.reshape(-1), projection
        )
        return logps_N.reshape(targets_BT.shape)
    return _sharded_token_logps(hidden_BTD, head_VD, targets_BT, mask_BT, projection)


def sum_logps(
    hidden_BTD: Array, head_VD: Array, targets_BT: Array, mask_BT: Array, projection: Projection
) -> tuple[Array, Array, Array]:
    """`losses.logprobs.sum_logps` for rows: (sum, logps `[B, T]`, is_argmax `[B, T]`)."""
    if ambient_mesh() is None:
        width = hidden_BTD.shape[-1]
        total, logps_N, is_argmax_N = logprobs.sum_logps(
            hidden_BTD.reshape(-1, width), head_VD, targets_BT.reshape(-1), mask_BT.reshape(-1), projection
        )
        return total, logps_N.reshape(targets_BT.shape), is_argmax_N.reshape(targets_BT.shape)
    return _sharded_sum_logps(hidden_BTD, head_VD, targets_BT, mask_BT, projection)


@dataclasses.dataclass(frozen=True)
class CompletionLogps:
    """Log-probabilities of the completions in rows, nats; 0 in unused entries.

    Attributes:
      sums_BN: over the completion's trained tokens.
      end_BN: of its last token alone, the end of the turn (0 where that is not trained).
    """

    sums_BN: Array
    end_BN: Array


def completion_logps(
    hidden_BTD: Array, head_VD: Array, batch: PreferenceBatch, projection: Projection
) -> CompletionLogps:
    """Log-probability of every completion given its prompt; differentiable."""
    mask_BT = shift_left(batch.loss_mask)
    logps_BT = token_logps(hidden_BTD, head_VD, shift_left(batch.tokens), mask_BT, projection)
    sums_BN = sum_branches(logps_BT, batch.branches, batch.last_token_index.shape[1])
    before_BN = jnp.maximum(batch.last_token_index - 1, 0)
    end_BN = jnp.take_along_axis(logps_BT, before_BN, axis=1)
    return CompletionLogps(sums_BN, jnp.where(batch.sequence_ids != 0, end_BN, 0.0))


def sum_branches(values_BT: Array, branches_BT: Array, count: int) -> Array:
    """Sums of values over each branch 1.. of a row, `[B, count]`."""

    def row(values_T: Array, branches_T: Array) -> Array:
        return jnp.zeros((count + 1,), values_T.dtype).at[branches_T].add(values_T)[1:]

    return jax.vmap(row)(values_BT, branches_BT)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How this call is split: specs of rows, of the head coming in, and of the head's gradient going out."""

    mesh: AbstractMesh
    projection: Projection
    head: P
    head_gradient: P
    scatter_width: bool


ROWS = P(BATCH_AXES, None)
ROWS_D = P(BATCH_AXES, None, None)


def _layout(head_VD: Array, projection: Projection) -> _Layout:
    mesh = ambient_mesh()
    assert mesh is not None
    vocab, width = head_VD.shape
    axis = "tensor" if mesh.shape["tensor"] > 1 and vocab % mesh.shape["tensor"] == 0 else None
    scatter = width % mesh.shape["fsdp"] == 0
    return _Layout(
        mesh=mesh,
        projection=dataclasses.replace(projection, vocab_axis=axis, batch_axes=BATCH_AXES),
        head=P(axis, None),
        head_gradient=P(axis, "fsdp" if scatter else None),
        scatter_width=scatter,
    )


def _local_gradients(
    hidden: Array, head: Array, targets: Array, mask: Array, weights: Array, layout: _Layout
) -> tuple[Array, Array, Array, Array]:
    rows, width = targets.shape, hidden.shape[-1]
    logps, is_argmax, d_hidden, d_head = logprobs._gradients(
        hidden.reshape(-1, width),
        head,
        targets.reshape(-1),
        mask.reshape(-1),
        weights.reshape(-1),
        layout.projection,
    )
    d_head = jax.lax.psum(d_head, "data")
    if layout.scatter_width:
        d_head = jax.lax.psum_scatter(d_head, "fsdp", scatter_dimension=1, tiled=True)
    else:
        d_head = jax.lax.psum(d_head, "fsdp")
    return logps.reshape(rows), is_argmax.reshape(rows), d_hidden.reshape(hidden.shape), d_head


def _gradients(
    hidden: Array, head: Array, targets: Array, mask: Array, weights: Array, layout: _Layout
) -> tuple[Array, Array, Array, Array]:
    return jax.shard_map(
        functools.partial(_local_gradients, layout=layout),
        mesh=layout.mesh,
        in_specs=(ROWS_D, layout.head, ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS, ROWS_D, layout.head_gradient),
        check_vma=False,
    )(hidden, head, targets, mask, weights)


def _forward(
    hidden: Array, head: Array, targets: Array, mask: Array, projection: Projection
) -> tuple[Array, Array]:
    layout = _layout(head, projection)

    def local(hidden: Array, head: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
        logps, is_argmax, _ = logprobs._forward(
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            targets.reshape(-1),
            mask.reshape(-1),
            layout.projection,
        )
        return logps.reshape(targets.shape), is_argmax.reshape(targets.shape)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(ROWS_D, layout.head, ROWS, ROWS),
        out_specs=(ROWS, ROWS),
        check_vma=False,
    )(hidden, head, targets, mask)


def _int_zero(values: Array) -> np.ndarray:
    return np.zeros(values.shape, jax.dtypes.float0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sharded_token_logps(hidden, head, targets, mask, projection):
    return _forward(hidden, head, targets, mask, projection)[0]


def _sharded_token_logps_fwd(hidden, head, targets, mask, projection):
    return _forward(hidden, head, targets, mask, projection)[0], (hidden, head, targets, mask)


def _sharded_token_logps_bwd(projection, residuals, cotangent):
    hidden, head, targets, mask = residuals
    layout = _layout(head, projection)
    _, _, d_hidden, d_head = _gradients(hidden, head, targets, mask, cotangent, layout)
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), _int_zero(targets), _int_zero(mask)


_sharded_token_logps.defvjp(_sharded_token_logps_fwd, _sharded_token_logps_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sharded_sum_logps(hidden, head, targets, mask, projection):
    logps, is_argmax = _forward(hidden, head, targets, mask, projection)
    return jnp.sum(logps), logps, is_argmax


def _sharded_sum_logps_fwd(hidden, head, targets, mask, projection):
    layout = _layout(head, projection)
    weights = jnp.ones(mask.shape, jnp.float32)
    logps, is_argmax, d_hidden, d_head = _gradients(hidden, head, targets, mask, weights, layout)
    residuals = (d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), targets, mask)
    return (jnp.sum(logps), logps, is_argmax), residuals


def _sharded_sum_logps_bwd(projection, residuals, cotangents):
    d_hidden, d_head, targets, mask = residuals
    scale = cotangents[0]
    return (
        (scale * d_hidden).astype(d_hidden.dtype),
        (scale * d_head).astype(d_head.dtype),
        _int_zero(targets),
        _int_zero(mask),
    )


_sharded_sum_logps.defvjp(_sharded_sum_logps_fwd, _sharded_sum_logps_bwd)
