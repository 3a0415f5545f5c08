"""REINFORCE: losses whose gradient is that of the expected reward, for tokens drawn from the policy being trained.

E[R] over completions y ~ pi has the gradient E[(R(y) - b) grad log pi(y)] for any baseline b that does not depend on y
(Williams 1992, Machine Learning 8). The losses are minus that with the gradient taken outside; their value means
nothing. There is no ratio and no clip: after the policy has moved, the estimate is biased (`losses.ppo` has both).

Rewards, baselines and advantages are data, without gradient. Arrays of a call have one shape (else ValueError).
"""

from __future__ import annotations

import jax

from posttrain_jax.core.types import Array, LossOutput
from posttrain_jax.losses.weighted_rows import rows_like, rows_of_mask


def sequence_loss(
    logps_B: Array, rewards_B: Array, baselines_B: Array, *, weights_B: Array | None = None
) -> LossOutput:
    """-(R(y) - b) log pi(y|x): the whole completion is one action.

    With `advantages.leave_one_out` as b it is RLOO (arXiv:2402.14740), whose R has the penalty inside:
    R = r - beta (log pi(y|x) - log pi_ref(y|x)), each summed over the completion's tokens.

    Args:
      logps_B: log pi(y|x), nats, summed over the completion's tokens; of any shape (`[B, K]` for K completions to a
      prompt).
      rewards_B: R(y).
      baselines_B: b; zeros = none.
      weights_B: None = 1 everywhere; 0 = no completion, whose loss and gradient are exactly 0 whatever stands there.

    Returns:
      The weight times the loss, float32; `count` = the sum of the weights. Metrics: `loss`, `advantages`, `logps`.
    """
    completions = rows_like(logps_B, weights_B)
    logps_B = completions.keep(logps_B)
    advantages_B = jax.lax.stop_gradient(completions.keep(rewards_B) - completions.keep(baselines_B))
    metrics = {"advantages": completions.metric(advantages_B), "logps": completions.metric(logps_B)}
    return completions.output(-advantages_B * logps_B, metrics)


def token_loss(logps_BT: Array, advantages_BT: Array, mask_BT: Array) -> LossOutput:
    """-A_t log pi(y_t|y_<t, x): every token is an action.

    With A_t = R(y) - b at every token, the sum over a completion is `sequence_loss`; with the reward to go minus a
    baseline (`advantages.discounted_returns`, or `advantages.gae` at gamma = lam = 1) the gradient has the same
    expectation and less variance. Divided by `count`, the gradient is that of the mean over completions divided by the
    batch's mean length.

    Args:
      logps_BT: log-probability of each token drawn, nats.
      advantages_BT: A_t.
      mask_BT: non-zero on the completions' tokens; elsewhere loss and gradient are exactly 0 whatever stands there.

    Returns:
      The loss `[B, T]`, float32; `count` = unmasked tokens. Metrics, per token: `loss`, `advantages`, `logps`.
    """
    tokens = rows_of_mask(mask_BT)
    logps_BT = tokens.keep(logps_BT)
    advantages_BT = jax.lax.stop_gradient(tokens.keep(advantages_BT))
    metrics = {"advantages": tokens.metric(advantages_BT), "logps": tokens.metric(logps_BT)}
    return tokens.output(-advantages_BT * logps_BT, metrics)
