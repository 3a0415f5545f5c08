"""An ensemble of reward models: every member's score of a completion, and one score of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.preference_groups import PreferenceSource
from posttrain_jax.data.preference_rows import RowShape
from posttrain_jax.forward.completions import map_completions, reward_scores_of
from posttrain_jax.losses.reward import (
    combine_scores_mean,
    combine_scores_min,
    combine_scores_uncertainty,
)
from posttrain_jax.models.io.load import LoadedModel

KINDS = ("mean", "min", "uncertainty")


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """How the members' scores of a completion become one (Coste et al., arXiv:2310.02743).

    Attributes:
      kind: "mean", "min" (the lowest) or "uncertainty" (mean - coefficient * variance).
      coefficient: of "uncertainty", above 0; 0 for the others.
    """

    kind: str = "mean"
    coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"combine is {self.kind!r}; use one of {', '.join(KINDS)}.")
        if (self.kind == "uncertainty") != (self.coefficient > 0) or self.coefficient < 0:
            raise InputError(
                f"combine={self.kind} with coefficient={self.coefficient:g}: a coefficient above 0 goes with "
                "uncertainty, and with it alone."
            )

    def __call__(self, scores_SE: np.ndarray) -> np.ndarray:
        """One score for each of S completions, `[S]`, of their scores by E members."""
        scores_ES = jnp.asarray(scores_SE.T)
        if self.kind == "mean":
            return np.asarray(combine_scores_mean(scores_ES))
        if self.kind == "min":
            return np.asarray(combine_scores_min(scores_ES))
        return np.asarray(combine_scores_uncertainty(scores_ES, coefficient=self.coefficient))


def member_scores(
    members: Sequence[LoadedModel], source: PreferenceSource, shape: RowShape, mesh: Mesh, *, groups: int
) -> np.ndarray:
    """Every member's score of every completion of a source, float32 `[S, E]`, S as in the source's store."""
    of_rows = reward_scores_of(members[0].model, shape.share_prompt)
    micro_batches = groups // (mesh.shape["data"] * mesh.shape["fsdp"])
    scores = [
        map_completions(
            of_rows, member.params, source, shape, mesh, groups=groups, micro_batches=micro_batches
        )
        for member in members
    ]
    return np.stack(scores, axis=-1)
