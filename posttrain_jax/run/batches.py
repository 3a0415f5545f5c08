"""Batches of rows on disk, as the loop takes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from posttrain_jax.core.types import CollectorState, PyTree, RowStream, StepBatch, TrainState


class RowBatches:
    """The collector of algorithms that learn from rows on disk.

    Args:
      rows: the loader, which reads ahead in threads of its own.
      put: this process's rows -> the global batch on the devices.
    """

    def __init__(self, rows: RowStream, put: Callable[[dict[str, np.ndarray]], PyTree]) -> None:
        self._rows = rows
        self._put = put

    def next(self, state: TrainState) -> StepBatch:
        """The next rows, whatever the state."""
        del state
        rows = next(self._rows)
        return StepBatch(self._put(rows.arrays), {}, rows.row_ids)

    def get_state(self) -> CollectorState:
        """The loader's."""
        return CollectorState(self._rows.get_state())

    def set_state(self, state: CollectorState) -> None:
        """Goes on where `get_state` was called. Raises InputError: the rows are others."""
        self._rows.set_state(state.values)

    def close(self) -> None:
        """Stops the loader's threads."""
        self._rows.close()
