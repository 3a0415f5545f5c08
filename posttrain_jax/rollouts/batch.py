"""From trajectories to the batch of a step: log-probabilities of the reference, the order of every epoch, packed rows.

Every collector ends with this, whatever its trajectories are and wherever they come from.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.types import Array, Metric, Metrics, PyTree, TrainState
from posttrain_jax.forward.packed_rows import PackedRows, map_rows
from posttrain_jax.forward.reference import ReferencePolicy, row_logps
from posttrain_jax.rollouts.trajectory import (
    BatchShape,
    HostTrajectories,
    Trajectory,
    TrajectoryBatch,
    put,
    stack,
)


class BatchMaker:
    """Makes batches of one shape.

    Args:
      shape: of every batch.
      mesh: of the devices.
      seed: of the run; with the step it gives the order of trajectories in every epoch.
      reference: None = no log-probabilities of a reference, and no forward pass for them.
      temperature: of the sampling.
    """

    def __init__(
        self,
        shape: BatchShape,
        mesh: Mesh,
        *,
        seed: int,
        reference: ReferencePolicy | None,
        temperature: float,
    ) -> None:
        self._shape = shape
        self._mesh = mesh
        self._seed = seed
        self._reference = reference
        self._reference_logps: Callable[[PyTree, PackedRows], Array] | None = None
        if reference is not None:
            self._reference_logps = row_logps(reference.model, temperature, mesh)

    def __call__(
        self, trajectories: Sequence[Trajectory], state: TrainState, auxiliary: PyTree
    ) -> tuple[TrajectoryBatch, Metrics]:
        """The batch on the devices, and the seconds that the reference took (no prefix in the name).

        Args:
          trajectories: at most as many as the shape has.
          state: that learns from them; its step gives the order of the epochs.
          auxiliary: rows that are learned from beside them, on the devices; {} = none.
        """
        orders_EN = epoch_orders(
            self._seed, int(state.step), epochs=self._shape.epochs, trajectories=self._shape.trajectories
        )
        host = stack(trajectories, self._shape, orders_EN)
        metrics: Metrics = {}
        if self._reference is not None:
            started = time.perf_counter()
            self._add_reference_logps(host, self._reference.of_state(state))
            metrics["seconds_reference"] = Metric.of(time.perf_counter() - started)
        has_reference = self._reference is not None
        return put(host, self._mesh, has_reference=has_reference, auxiliary=auxiliary), metrics

    def _add_reference_logps(self, host: HostTrajectories, params: PyTree) -> None:
        """In the rows that the train step begins with, so that equal weights give equal log-probabilities."""
        assert self._reference_logps is not None
        mask_NS = host.arrays["response_mask"]
        logps_NS = map_rows(
            self._reference_logps, params, host.arrays["tokens"], mask_NS, host.first_epoch, self._mesh
        )
        # A row's numbers stand at the token before.
        host.arrays["reference_logps"][:, 1:] = logps_NS[:, :-1] * mask_NS[:, 1:]


def epoch_orders(seed: int, step: int, *, epochs: int, trajectories: int) -> np.ndarray:
    """For each epoch a permutation of the trajectories, int32 `[E, N]`; the same in every process."""
    return np.asarray(_orders(jax.random.key(np.uint32(seed)), np.int32(step), epochs, trajectories))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _orders(key: Array, step: Array, epochs: int, trajectories: int) -> Array:
    keys = jax.random.split(jax.random.fold_in(key, step), epochs)
    return jax.vmap(lambda one: jax.random.permutation(one, trajectories))(keys)
