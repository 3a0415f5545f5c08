"""Trajectories packed into rows for the model's forward pass: which token of which trajectory stands where.

The numbers of N trajectories lie in arrays `[N, S]`, one trajectory a row, padded on the right, and all that is
computed of whole trajectories (returns, advantages, means) is computed there. The model alone reads packed rows:

    tokens     a a a a a a  c c c c .        segment_ids  1 1 1 1 1 1  3 3 3 3 0
    positions  0 1 2 3 4 5  0 1 2 3 0        indices      0 1 2 3 4 5  2S ... 2S+3  NS

An index is `n * S + t`, token t of trajectory n; N * S is padding. The hidden state at a token predicts the next one,
so what a row's forward pass gives for token t stands at token t - 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.sharding import BATCH_AXES
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.data.packing import best_fit
from posttrain_jax.forward.heads import token_logps
from posttrain_jax.losses.logprobs import Projection
from posttrain_jax.models.transformer import Model, head_VD

WHOLE = P()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of a micro-batch, `[R, T]` int32 each.

    Attributes:
      indices: see the module.
      tokens, segment_ids, positions: as the model takes them; a trajectory's segment id is its number + 1.
      targets: the next token of the same trajectory.
      mask: 1 where the target is one that counts.
      trajectories, length: N and S.
    """

    indices: Array
    tokens: Array
    segment_ids: Array
    positions: Array
    targets: Array
    mask: Array
    trajectories: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})

    def at_targets(self, values_NS: Array) -> Array:
        """Numbers of tokens, where they are predicted, `[R, T]`; 0 where nothing is predicted."""
        return jnp.where(self.mask != 0, _take(values_NS, self.indices + 1, jnp), 0)

    def sums(self, values_RT: Array) -> Array:
        """For each trajectory the sum over its targets that count, float32 `[N]`; differentiable."""
        owner_RT = jnp.where(self.mask != 0, self.segment_ids - 1, self.trajectories)
        counted_RT = jnp.where(self.mask != 0, values_RT, 0.0)
        sums = jax.ops.segment_sum(counted_RT.reshape(-1), owner_RT.reshape(-1), self.trajectories + 1)
        return sums[: self.trajectories]

    def present(self) -> Array:
        """Whether a trajectory has a target here that counts, bool `[N]` (a trajectory never lies in two rows)."""
        return self.sums(jnp.ones(self.mask.shape, jnp.float32)) > 0


def packed_rows(indices_RT: Any, tokens_NS: Any, mask_NS: Any, xp: Any = jnp) -> PackedRows:
    """The rows that some indices make.

    Args:
      indices_RT: int32, see the module.
      tokens_NS: int32.
      mask_NS: non-zero on the tokens that count as targets; never on the first of a trajectory.
      xp: jax.numpy inside a step, numpy on the host.
    """
    trajectories, length = tokens_NS.shape
    filled_RT = indices_RT < trajectories * length
    return PackedRows(
        indices=indices_RT,
        tokens=_take(tokens_NS, indices_RT, xp),
        segment_ids=xp.where(filled_RT, indices_RT // length + 1, 0),
        positions=xp.where(filled_RT, indices_RT % length, 0),
        targets=_take(tokens_NS, indices_RT + 1, xp),
        mask=xp.where(filled_RT, _take(mask_NS, indices_RT + 1, xp) != 0, False).astype(np.int32),
        trajectories=trajectories,
        length=length,
    )


def _take(values_NS: Any, indices: Any, xp: Any) -> Any:
    """0 beyond the last trajectory."""
    flat = xp.concatenate([values_NS.reshape(-1), xp.zeros(2, values_NS.dtype)])
    return flat[indices]


def scatter(values: Array, indices: Array, mask: Array, shape: tuple[int, ...]) -> Array:
    """What rows (of any leading shape) give for their targets as `[N, S]`, 0 elsewhere."""
    size = shape[0] * shape[1]
    at = jnp.where(mask != 0, indices + 1, size).reshape(-1)
    return jnp.zeros(size, values.dtype).at[at].set(values.reshape(-1), mode="drop").reshape(shape)


def pack_indices(
    lengths_N: np.ndarray,
    members: np.ndarray,
    *,
    length: int,
    row_length: int,
    micro_batches: int,
    micro_rows: int,
) -> np.ndarray:
    """Where some trajectories lie in rows, int32 `[M, R, T]`: best fit, longest first, empty rows last.

    Args:
      lengths_N: tokens of every trajectory; one of 0 tokens lies nowhere.
      members: which of them, in order (equal lengths keep it).
      length: S.
      row_length: T, at least the longest.
      micro_batches, micro_rows: M and R; M * R rows must hold them.
    """
    indices = np.full((micro_batches * micro_rows, row_length), len(lengths_N) * length, np.int32)
    members = members[lengths_N[members] > 0]
    for row, packed in enumerate(best_fit(lengths_N[members], row_length)):
        at = 0
        for number in members[packed].tolist():
            size = int(lengths_N[number])
            indices[row, at : at + size] = number * length + np.arange(size)
            at += size
    return indices.reshape(micro_batches, micro_rows, row_length)


def put_on(mesh: Mesh, values: np.ndarray, spec: P = WHOLE) -> Array:
    """A host array that every process has, split (or, with the default, whole) over the devices."""
    return jax.make_array_from_callback(
        values.shape, NamedSharding(mesh, spec), lambda index: np.asarray(values[index])
    )


def map_rows(
    of_rows: Callable[[PyTree, PackedRows], Array],
    params: PyTree,
    tokens_NS: np.ndarray,
    mask_NS: np.ndarray,
    indices_MRT: np.ndarray,
    mesh: Mesh,
) -> np.ndarray:
    """`of_rows` of every micro-batch that is not empty, at the rows' tokens, float32 `[N, S]` on the host.

    Args:
      of_rows: jitted: (parameters, rows `[R, T]`) -> float32 `[R, T]`, replicated.
      params: on `mesh`.
      tokens_NS, mask_NS, indices_MRT: see the module; every process has all of them.
      mesh: of the devices.
    """
    trajectories, length = tokens_NS.shape
    out = np.zeros(trajectories * length, np.float32)
    for indices_RT in indices_MRT:
        filled_RT = indices_RT < out.size
        if not filled_RT.any():
            continue
        rows = packed_rows(indices_RT, tokens_NS, mask_NS, np)
        # Static sizes of the store would make a program of every number of trajectories.
        rows = dataclasses.replace(rows, trajectories=0, length=0)
        placed = jax.tree.map(lambda leaf: put_on(mesh, leaf, P(BATCH_AXES, None)), rows)
        values_RT = np.asarray(of_rows(params, placed))
        out[indices_RT[filled_RT]] = values_RT[filled_RT]
    return out.reshape(trajectories, length)


def hidden_states(params: PyTree, rows: PackedRows, model: Model) -> Array:
    """Final hidden states of rows, `[R, T, D]`."""
    return model.apply(
        params,
        rows.tokens,
        segment_ids_BT=rows.segment_ids,
        positions_BT=rows.positions,
        logits=False,
    ).hidden_BTD


def every_index(tokens_RT: Array) -> Array:
    """0, 1, ... T - 1 in every row, int32 `[R, T]`: for `reward_head.scores` of every token."""
    return jnp.broadcast_to(jnp.arange(tokens_RT.shape[1], dtype=jnp.int32)[None], tokens_RT.shape)


def target_logps(
    params: PyTree, hidden_RTD: Array, rows: PackedRows, model: Model, temperature: float
) -> Array:
    """Log-probabilities of the targets that count, float32 `[R, T]`, nats, at the temperature of the sampling."""
    projection = Projection(softcap=model.config.logits_softcap, temperature=temperature)
    return token_logps(hidden_RTD, head_VD(params), rows.targets, rows.mask, projection)
