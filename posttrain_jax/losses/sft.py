"""The loss of supervised fine-tuning: negative log-likelihood of the trained tokens."""

from __future__ import annotations

import jax.numpy as jnp

from posttrain_jax.core.types import Array, LossOutput, Metric


def nll_loss(logps_BT: Array, mask_BT: Array) -> LossOutput:
    """Negative log-likelihood per trained token: -log p(y_t | y_<t).

    InstructGPT (arXiv:2203.02155, section 3.5) and Tulu 3 (arXiv:2411.15124, section 4.3.2). The mean is over
    all trained tokens of the global batch (sum over sum), not a mean of per-row means, so that a token weighs
    the same in a short and a long completion and the micro-batch split does not matter.

    Args:
      logps_BT: float32 log-probability of each target token.
      mask_BT: 1 = trained.

    Returns:
      loss `[B, T]` in nats, 0 where masked; count = trained tokens.
    """
    trained_BT = mask_BT != 0
    loss_BT = jnp.where(trained_BT, -logps_BT.astype(jnp.float32), 0.0)
    count = jnp.sum(trained_BT, dtype=jnp.float32)
    return LossOutput(loss=loss_BT, count=count, metrics={"loss": Metric(jnp.sum(loss_BT), count)})
