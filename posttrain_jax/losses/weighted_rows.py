"""Weights and padding, for all losses of one value per row.

A row is a pair of completions, a completion, a prompt or a token; its `weight` says how much it counts. Weight 0 means
that there is no row (padding). Whatever stands in such a row, NaN included, is replaced by 0 before anything is
computed from it, so that its loss and its gradient are exactly 0.

`count` of every loss is the sum of the weights, so that `loss.sum() / count` is the weighted mean, and sums of
micro-batches and devices give the value of the whole batch.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from posttrain_jax.core.types import Array, LossOutput, Metric, Metrics


@dataclasses.dataclass(frozen=True)
class Rows:
    """The weights of the rows of one batch.

    Attributes:
      weights_B: float32, not negative; 0 = padding.
    """

    weights_B: Array

    def keep(self, values_B: Array) -> Array:
        """`values_B` as float32, 0 in rows of weight 0.

        Raises:
          ValueError: the shape is not that of the weights; a broadcast would pair every row with every other.
        """
        values_B = jnp.asarray(values_B)
        if values_B.shape != self.weights_B.shape:
            raise ValueError(
                f"Arrays of one loss have one shape, but there are {values_B.shape} and {self.weights_B.shape}."
            )
        return jnp.where(self.weights_B != 0, values_B.astype(jnp.float32), 0.0)

    def metric(self, values_B: Array) -> Metric:
        """The weighted mean of `values_B` over the rows, as a sum and a count."""
        return Metric(jnp.sum(self.weights_B * values_B), jnp.sum(self.weights_B))

    def output(self, values_B: Array, metrics: Metrics) -> LossOutput:
        """The loss of rows whose unweighted loss is `values_B`; adds the metric `loss`."""
        loss_B = jnp.where(self.weights_B != 0, self.weights_B * values_B, 0.0)
        count = jnp.sum(self.weights_B)
        return LossOutput(
            loss=loss_B, count=count, metrics={"loss": Metric(jnp.sum(loss_B), count), **metrics}
        )


def rows_like(values_B: Array, weights_B: Array | None) -> Rows:
    """The rows of `values_B` under their weights; None = every row counts 1."""
    if weights_B is None:
        return Rows(jnp.ones(jnp.shape(values_B), jnp.float32))
    return Rows(jnp.asarray(weights_B).astype(jnp.float32))


def rows_of_mask(mask: Array) -> Rows:
    """Rows that count 1 where `mask` is non-zero (whatever its dtype), of its shape: the tokens of `[B, T]`."""
    return Rows((jnp.asarray(mask) != 0).astype(jnp.float32))


def per_token(sums_B: Array, lengths_B: Array) -> Array:
    """Sums over a completion's tokens divided by how many there are (an empty completion counts as one token)."""
    return sums_B / jnp.maximum(lengths_B, 1.0)
