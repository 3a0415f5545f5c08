"""KL(policy || reference): three estimates from tokens that the policy drew, and the exact value from logits.

Schulman, "Approximating KL divergence" (2020, http://joschu.net/blog/kl-approx.html), with x ~ policy and
r = reference(x) / policy(x). As numbers, and as losses (differentiated through log policy(x) while the tokens stay as
they are), they are good for different things:

    estimator                expectation           expected gradient of the estimate as a loss
    k1 = -log r              KL (can be < 0)       0: the score has mean 0, so it teaches nothing
    k2 = (log r)^2 / 2       not KL (biased)       that of KL(policy || reference)
    k3 = r - 1 - log r >= 0  KL, less variance     that of KL(reference || policy): the wrong one

So k1 or k3 is reported, and k2 is the penalty inside a loss. k1 as a (constant) reward, with the policy gradient
E[k1 * grad log policy(x)], has the right gradient too: that is InstructGPT's penalty (arXiv:2203.02155, eq. 2). GRPO
(arXiv:2402.03300, eq. 4) puts k3 into its loss. All of this holds for tokens drawn from the policy at temperature 1
without filters; a token's estimate is of the KL of the next token's distribution, given what stands before it, and
the sum over a completion (k1 or k3) is an unbiased estimate of the KL of whole completions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array


def k1(policy_logps_BT: Array, reference_logps_BT: Array) -> Array:
    """-log r = log policy - log reference, float32, nats; unbiased, no use as a loss (expected gradient 0).

    Args:
      policy_logps_BT, reference_logps_BT: each model's log-probability of tokens that the policy drew; of any shape.
    """
    return policy_logps_BT.astype(jnp.float32) - reference_logps_BT.astype(jnp.float32)


def k2(policy_logps_BT: Array, reference_logps_BT: Array) -> Array:
    """(log r)^2 / 2, float32, nats; biased as a value, and the one whose gradient is that of the KL.

    Args:
      policy_logps_BT, reference_logps_BT: as `k1`.
    """
    return 0.5 * jnp.square(k1(policy_logps_BT, reference_logps_BT))


def k3(policy_logps_BT: Array, reference_logps_BT: Array) -> Array:
    """r - 1 - log r, float32, nats; unbiased and never negative; as a loss it follows KL(reference || policy).

    Its variance is finite only where the reference does not like rare tokens much better than the policy does, and
    it overflows to infinity where log r is above 88.

    Args:
      policy_logps_BT, reference_logps_BT: as `k1`.
    """
    log_ratio_BT = -k1(policy_logps_BT, reference_logps_BT)
    return jnp.expm1(log_ratio_BT) - log_ratio_BT


def adapted_kl_coefficient(
    coefficient: float | Array, kl: float | Array, *, target: float, horizon: float, episodes: int
) -> Array:
    """beta * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon), scalar float32: the next coefficient.

    Ziegler et al., arXiv:1909.08593, section 2.2 (K_beta e_t, with K_beta = episodes / horizon as in their code):
    a KL above its target raises the penalty, one below lowers it. A KL that is NaN leaves it as it is, so that one
    broken batch does not end the run.

    Args:
      coefficient: beta, of the batch just collected.
      kl: that batch's KL of whole completions to the reference, nats: the mean over completions of the sum over
        tokens of k1.
      target: the KL that is aimed at, nats; above 0.
      horizon: in how many episodes a KL that stays far off moves beta by about 20 %.
      episodes: completions in the batch; at 5 horizons or more beta could become negative.

    Raises:
      ValueError: the target or horizon is not above 0, or the batch is 5 horizons or more.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"The KL's target and horizon are above 0; they are {target} and {horizon}.")
    if not 0 <= episodes < 5 * horizon:
        raise ValueError(
            f"A batch of {episodes} episodes with a horizon of {horizon} could make the KL coefficient negative; "
            "use a horizon of more than a fifth of the batch."
        )
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    error = jnp.where(jnp.isnan(error), 0.0, error)
    return jnp.asarray(coefficient, jnp.float32) * (1.0 + error * episodes / horizon)


def categorical_kl(policy_logits_BTV: Array, reference_logits_BTV: Array) -> Array:
    """sum_v p_v (log p_v - log q_v) over the last axis, float32 `[B, T]`, nats; differentiable in both.

    A token whose policy logit is -inf adds nothing; one that only the reference excludes makes the KL infinite.

    Args:
      policy_logits_BTV, reference_logits_BTV: logits, not normalized; of any shape, equal for both.
    """
    policy_logps = jax.nn.log_softmax(policy_logits_BTV.astype(jnp.float32))
    reference_logps = jax.nn.log_softmax(reference_logits_BTV.astype(jnp.float32))
    possible = policy_logps > -jnp.inf
    # Both sides are replaced where p = 0: 0 * inf would be NaN, in the value or in its gradient.
    safe_policy = jnp.where(possible, policy_logps, 0.0)
    safe_reference = jnp.where(possible, reference_logps, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(safe_policy), 0.0) * (safe_policy - safe_reference), axis=-1)
