"""The reference policy: what the KL of reinforcement learning is measured to, and what DPO compares with.

    none      there is none: nothing is loaded, nothing is computed
    frozen    the policy that training starts from, as a second copy of the parameters
    adapter   the policy with its LoRA adapter left out, which is the policy that training starts from
    ema       the moving average of the policy's weights (optim.ema)
    MODEL     another model with the same tokens (a Hugging Face folder or name, a workdir, asset:NAME)

`forward/reference_cache.py` keeps on disk what a reference that does not change says of a data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from posttrain_jax.core.sharding import jit_step, replicated
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import Array, PyTree, TrainState
from posttrain_jax.forward.packed_rows import PackedRows, hidden_states, target_logps
from posttrain_jax.models.spec import is_adapter
from posttrain_jax.models.transformer import Model

KINDS = ("none", "frozen", "adapter", "ema")


@dataclasses.dataclass(frozen=True)
class ReferencePolicy:
    """A reference that is computed.

    Attributes:
      kind: "frozen", "adapter", "ema" or a MODEL.
      model: the definition that its parameters belong to.
      params: those that lie on the mesh for the whole run; {} of "adapter" and "ema", which are the policy's own.
    """

    kind: str
    model: Model
    params: PyTree

    def parameters(self, policy_params: PyTree, ema_params: PyTree, params: PyTree) -> PyTree:
        """The reference's parameters; inside a jitted step too, whose arguments these are.

        Args:
          policy_params: the policy's, whole.
          ema_params: their moving average, whole; looked at by "ema" alone.
          params: as `self.params`.
        """
        if self.kind == "adapter":
            return partition(policy_params, is_adapter)[1]
        return ema_params if self.kind == "ema" else params

    def of_state(self, state: TrainState) -> PyTree:
        """The reference's parameters at a state of the training, without a value network's."""
        ema = combine(state.ema, state.frozen) if self.kind == "ema" else {}
        params = self.parameters(combine(state.params, state.frozen), ema, self.params)
        return {name: part for name, part in params.items() if name != "value"}


def row_logps(model: Model, temperature: float, mesh: Mesh) -> Callable[[PyTree, PackedRows], Array]:
    """A jitted (parameters, packed rows `[R, T]`) -> log-probabilities of the targets, for `packed_rows.map_rows`."""

    def step(params: PyTree, rows: PackedRows) -> Array:
        return target_logps(params, hidden_states(params, rows, model), rows, model, temperature)

    return jit_step(step, mesh, in_shardings=None, out_shardings=replicated(mesh))
