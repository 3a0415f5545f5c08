"""The contract between what samples and what learns: a trajectory on the host, and a batch of them on the devices.

A trajectory is a prompt and what followed it. Every number of a token stands at the token itself: `response_mask` is 1
on the tokens that the policy sampled (its end-of-turn tokens included, wherever in the trajectory they stand), 0 on the
prompt and on what an environment wrote.

Three policies may differ: the one that sampled (mu, `sampler_logps`, whose weights are those of `policy_step`), the one
that training starts from in this iteration (pi_old, which a train step computes), and the one being trained (pi).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.sharding import BATCH_AXES
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.forward.packed_rows import pack_indices, put_on


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One completion of a prompt, on the host.

    Attributes:
      prompt: what it begins with; its columns are for the rewards.
      tokens: int32 `[t]`: prompt and completion, the stop token included.
      response_mask: int32 `[t]`, 1 where the policy sampled the token; the first token is the prompt's.
      sampler_logps: float32 `[t]`, nats: under the distribution that the token was drawn from; 0 outside the mask.
      ended: whether it ended by a stop token (or the token that it is truncated at), not by the limit.
      group: number of its prompt in this iteration; the trajectories of a group lie side by side.
      policy_step: of the oldest weights that sampled a token of it.
      score: what it was rewarded with.
      has_score: False where a reward function failed: nothing is learned from it, and it is in no statistic of others.
      reference_logps: float32 `[t]`, nats, of the reference policy; None where there is none.
    """

    prompt: Prompt
    tokens: np.ndarray
    response_mask: np.ndarray
    sampler_logps: np.ndarray
    ended: bool
    group: int
    policy_step: int
    score: float = 0.0
    has_score: bool = False
    reference_logps: np.ndarray | None = None

    @property
    def response(self) -> np.ndarray:
        """The tokens that the policy sampled, int32."""
        return self.tokens[self.response_mask != 0]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static sizes of an iteration's batch, the same in every iteration.

    Attributes:
      trajectories: N.
      length: S, most tokens of a trajectory.
      epochs, minibatches: E passes over all trajectories, each in K minibatches of N / K trajectories.
      micro_batches: M, of a minibatch; those that stay empty are not computed.
      micro_rows: R, packed rows of a micro-batch.
      row_length: T, tokens of a row.
    """

    trajectories: int
    length: int
    epochs: int
    minibatches: int
    micro_batches: int
    micro_rows: int
    row_length: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrajectoryBatch:
    """An iteration's trajectories on the devices.

    Attributes:
      tokens, response_mask: int32 `[N, S]`, as in `Trajectory`, padded with 0 on the right.
      sampler_logps, reference_logps: float32 `[N, S]`; the latter None where there is no reference.
      scores: float32 `[N]`.
      has_score, groups, policy_steps: int32 `[N]`.
      indices: int32 `[E, K, M, R, T]`: the packed rows of every minibatch (see `forward/packed_rows.py`).
      auxiliary: other rows that are learned from beside them, a `Batch` (`[M', B, T']`); or {}.
    """

    tokens: Array
    response_mask: Array
    sampler_logps: Array
    reference_logps: Array | None
    scores: Array
    has_score: Array
    groups: Array
    policy_steps: Array
    indices: Array
    auxiliary: PyTree


@dataclasses.dataclass(frozen=True)
class HostTrajectories:
    """Trajectories as arrays on the host, with their packed rows; `TrajectoryBatch` says what is what."""

    arrays: dict[str, np.ndarray]
    indices: np.ndarray

    @property
    def first_epoch(self) -> np.ndarray:
        """Rows that hold every trajectory once, int32 `[K * M, R, T]`: those of the first epoch's minibatches."""
        return self.indices[0].reshape(-1, *self.indices.shape[3:])


def stack(trajectories: Sequence[Trajectory], shape: BatchShape, orders_EN: np.ndarray) -> HostTrajectories:
    """Trajectories as arrays, and how each epoch's minibatches are packed.

    A minibatch is a set of trajectories. They are packed in the order of their numbers, so that the same set lies in
    the same rows in every epoch.

    Args:
      trajectories: N, or fewer (the others are empty).
      shape: of the batch.
      orders_EN: for each epoch a permutation of the N; its consecutive parts are the minibatches.
    """
    size = (shape.trajectories, shape.length)
    arrays = {name: np.zeros(size, np.int32) for name in ("tokens", "response_mask")}
    arrays |= {name: np.zeros(size, np.float32) for name in ("sampler_logps", "reference_logps")}
    arrays |= {name: np.zeros(size[:1], np.int32) for name in ("has_score", "groups", "policy_steps")}
    arrays["scores"] = np.zeros(size[:1], np.float32)
    for number, one in enumerate(trajectories):
        count = one.tokens.size
        arrays["tokens"][number, :count] = one.tokens
        arrays["response_mask"][number, :count] = one.response_mask
        arrays["sampler_logps"][number, :count] = one.sampler_logps
        if one.reference_logps is not None:
            arrays["reference_logps"][number, :count] = one.reference_logps
        arrays["scores"][number], arrays["has_score"][number] = one.score, one.has_score
        arrays["groups"][number], arrays["policy_steps"][number] = one.group, one.policy_step
    lengths = np.zeros(shape.trajectories, np.int64)
    lengths[: len(trajectories)] = [one.tokens.size for one in trajectories]
    minibatches = np.sort(orders_EN.reshape(shape.epochs * shape.minibatches, -1), axis=-1)
    packed = [
        pack_indices(
            lengths,
            members,
            length=shape.length,
            row_length=shape.row_length,
            micro_batches=shape.micro_batches,
            micro_rows=shape.micro_rows,
        )
        for members in minibatches
    ]
    indices = np.stack(packed).reshape(shape.epochs, shape.minibatches, *packed[0].shape)
    return HostTrajectories(arrays, indices)


def put(host: HostTrajectories, mesh: Mesh, *, has_reference: bool, auxiliary: PyTree) -> TrajectoryBatch:
    """The batch on the devices: trajectories whole on each, packed rows split over data and fsdp.

    Every process has all trajectories, and gives what its devices hold, wherever they stand in the mesh.

    Args:
      host: from `stack`.
      mesh: of the devices.
      has_reference: whether the trajectories carry log-probabilities of a reference.
      auxiliary: on the devices already; {} = none.
    """
    arrays = dict(host.arrays)
    reference_logps = arrays.pop("reference_logps")
    return TrajectoryBatch(
        **{name: put_on(mesh, array) for name, array in arrays.items()},
        reference_logps=put_on(mesh, reference_logps) if has_reference else None,
        indices=put_on(mesh, host.indices, P(None, None, None, BATCH_AXES, None)),
        auxiliary=auxiliary,
    )
