"""The losses of proximal policy optimization (PPO, arXiv:1707.06347), and the numbers by which it is watched.

`logps_BT` are log-probabilities of the tokens drawn under the policy being trained, `old_logps_BT` those under the
policy that drew them (both at the temperature of the drawing), nats; r_t = exp(logps - old_logps). `mask_BT` is
non-zero on the completions' tokens; what stands elsewhere, NaN included, has a loss and gradient of exactly 0. Arrays
of a call have one shape (else ValueError): `[B, T]`, or `[B]` for whole completions (sums over their tokens), as TRL's
RLOO has.

Losses are unreduced, float32, 0 where masked; `count` = unmasked entries, so `loss.sum() / count` is the mean over
tokens of the whole batch. Only the first argument is differentiated: old log-probabilities, advantages, old values
and returns are data. Metrics are means over the same entries; `ratio_max`, which is no mean, stands apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array, LossOutput, Metric, Metrics
from posttrain_jax.losses import kl
from posttrain_jax.losses.weighted_rows import Rows, rows_of_mask

# The log-ratio is kept within +-20 (as in verl), a ratio of 4.9e8: beyond it exp overflows in float32 at 88.7, where a
# clipped token's gradient would be 0 * infinity = NaN.
MOST_LOG_RATIO = 20.0


def _log_ratio(tokens: Rows, logps_BT: Array, old_logps_BT: Array) -> Array:
    difference_BT = tokens.keep(logps_BT) - jax.lax.stop_gradient(tokens.keep(old_logps_BT))
    return jnp.clip(difference_BT, -MOST_LOG_RATIO, MOST_LOG_RATIO)


def clipped_policy_loss(
    logps_BT: Array,
    old_logps_BT: Array,
    advantages_BT: Array,
    mask_BT: Array,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> LossOutput:
    """max(-A_t r_t, -A_t clip(r_t, 1 - clip, 1 + clip_high)), the clipped surrogate as a loss.

    arXiv:1707.06347, eq. 7. With `dual_clip` = c the loss of a token with A_t < 0 is at most -c A_t (Ye et al.,
    arXiv:1912.09729), which bounds what one token can do whose probability has grown. The gradient is 0 where the
    clipped side is the larger one, and where the second bound holds.

    Departs from the papers where |log r_t| > 20: the ratio stops there, and has no gradient.

    Args:
      logps_BT, old_logps_BT, mask_BT: see the module.
      advantages_BT: A_t, whitened or not.
      clip: how far the ratio may fall below 1, in units of the ratio; above 0 (at 1 or more, as far as it likes).
      clip_high: how far it may rise above 1, where that differs (DAPO's clip-higher, arXiv:2503.14476); None = `clip`.
      dual_clip: c, above 1 (usually 3); None = off.

    Returns:
      The loss per token. Metrics: `loss`; `clip_fraction`, tokens whose clipped side is strictly the larger (as in
      OpenAI's code and TRL; |r_t - 1| > clip alone counts more); `ratio`; `approx_kl_k1`, `approx_kl_k2`,
      `approx_kl_k3`, estimates of KL(old || new) as in `losses.kl` (k2 is OpenAI's approxkl); with `dual_clip`,
      `dual_clip_fraction`, tokens at the second bound.

    Raises:
      ValueError: shapes that differ, or a clip out of its range.
    """
    clip_high = clip if clip_high is None else clip_high
    if clip <= 0 or clip_high <= 0:
        raise ValueError(f"PPO's clip and clip_high are above 0; they are {clip} and {clip_high}.")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"PPO's dual_clip is above 1 (or None, off); it is {dual_clip}.")
    tokens = rows_of_mask(mask_BT)
    advantages_BT = jax.lax.stop_gradient(tokens.keep(advantages_BT))
    log_ratio_BT = _log_ratio(tokens, logps_BT, old_logps_BT)
    ratio_BT = jnp.exp(log_ratio_BT)
    free_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * jnp.clip(ratio_BT, 1.0 - clip, 1.0 + clip_high)
    loss_BT = jnp.maximum(free_BT, clipped_BT)
    # x = old, reference = new: k1 = -log r, k3 = r - 1 - log r.
    zero_BT = jnp.zeros_like(log_ratio_BT)
    metrics = {
        "clip_fraction": tokens.metric((clipped_BT > free_BT).astype(jnp.float32)),
        "ratio": tokens.metric(ratio_BT),
        "approx_kl_k1": tokens.metric(kl.k1(zero_BT, log_ratio_BT)),
        "approx_kl_k2": tokens.metric(kl.k2(zero_BT, log_ratio_BT)),
        "approx_kl_k3": tokens.metric(kl.k3(zero_BT, log_ratio_BT)),
    }
    if dual_clip is not None:
        bound_BT = -dual_clip * advantages_BT
        at_bound_BT = (advantages_BT < 0) & (loss_BT > bound_BT)
        loss_BT = jnp.where(at_bound_BT, bound_BT, loss_BT)
        metrics["dual_clip_fraction"] = tokens.metric(at_bound_BT.astype(jnp.float32))
    return tokens.output(loss_BT, metrics)


def ratio_max(logps_BT: Array, old_logps_BT: Array, mask_BT: Array) -> Array:
    """The largest r_t of an unmasked token, float32 scalar without gradient; 0 when there is none.

    No `Metric`, for it is no mean: micro-batches are joined by their maximum. At most exp(20), as in the loss.

    Args:
      logps_BT, old_logps_BT, mask_BT: see the module.
    """
    tokens = rows_of_mask(mask_BT)
    ratio_BT = jnp.exp(_log_ratio(tokens, logps_BT, old_logps_BT))
    return jax.lax.stop_gradient(jnp.max(jnp.where(tokens.weights_B != 0, ratio_BT, 0.0), initial=0.0))


def clipped_value_loss(
    values_BT: Array, old_values_BT: Array, returns_BT: Array, mask_BT: Array, *, clip: float | None
) -> LossOutput:
    """max((V_t - R_t)^2, (clip(V_t, V_old - clip, V_old + clip) - R_t)^2) / 2.

    OpenAI's baselines and lm-human-preferences; not in the paper of PPO. The gradient is 0 where the clipped side is
    the larger one: V has moved by more than `clip`, towards R. The coefficient (0.1 in most RLHF) is the caller's.

    Args:
      values_BT: V_t of the value function being trained.
      old_values_BT: V_old, of the value function at the time of the drawing.
      returns_BT: R_t, as from `advantages.gae`.
      mask_BT: see the module.
      clip: how far V may move, in the unit of the rewards; None or 0 = (V_t - R_t)^2 / 2 without a bound.

    Returns:
      The loss per token. Metrics: `loss`; `value_clip_fraction`, tokens whose clipped side is strictly the larger;
      `values`; and the four means of which `explained_variance` is made: `returns`, `returns_squared`,
      `value_errors` (R - V_old, of values that had not seen these returns) and `value_errors_squared`.

    Raises:
      ValueError: shapes that differ, or a clip below 0.
    """
    if clip is not None and clip < 0:
        raise ValueError(f"The value function's clip is above 0 (0 or None = off); it is {clip}.")
    tokens = rows_of_mask(mask_BT)
    values_BT = tokens.keep(values_BT)
    old_values_BT = jax.lax.stop_gradient(tokens.keep(old_values_BT))
    returns_BT = jax.lax.stop_gradient(tokens.keep(returns_BT))
    free_BT = jnp.square(values_BT - returns_BT)
    clipped_BT = free_BT
    if clip:
        near_BT = jnp.clip(values_BT, old_values_BT - clip, old_values_BT + clip)
        clipped_BT = jnp.square(near_BT - returns_BT)
    errors_BT = returns_BT - old_values_BT
    metrics = {
        "value_clip_fraction": tokens.metric((clipped_BT > free_BT).astype(jnp.float32)),
        "values": tokens.metric(values_BT),
        "returns": tokens.metric(returns_BT),
        "returns_squared": tokens.metric(jnp.square(returns_BT)),
        "value_errors": tokens.metric(errors_BT),
        "value_errors_squared": tokens.metric(jnp.square(errors_BT)),
    }
    return tokens.output(0.5 * jnp.maximum(free_BT, clipped_BT), metrics)


def explained_variance(metrics: Metrics) -> Array:
    """1 - Var(R - V_old) / Var(R), scalar float32, from the added up metrics of `clipped_value_loss`.

    1 = the values tell all differences between the returns, 0 = none, below 0 = worse than one number for all. NaN
    where the returns do not vary by more than the rounding of their squares, or where there are none.
    """

    def mean(metric: Metric) -> Array:
        return metric.sum / metric.count

    returns_squared = mean(metrics["returns_squared"])
    of_returns = returns_squared - jnp.square(mean(metrics["returns"]))
    of_errors = mean(metrics["value_errors_squared"]) - jnp.square(mean(metrics["value_errors"]))
    vary = of_returns > 1e-6 * returns_squared
    return jnp.where(vary, 1.0 - of_errors / jnp.where(vary, of_returns, 1.0), jnp.nan)


def entropy_of_logits(logits_BTV: Array) -> Array:
    """-sum_v p_v log p_v over the last axis, float32 `[B, T]`, nats; differentiable.

    A token whose logit is -inf adds nothing, and gets no gradient. For a bonus, subtract its mean over unmasked tokens
    times a coefficient from the loss; the temperature is the caller's (divide first).

    Args:
      logits_BTV: not normalized, of any shape and float dtype.
    """
    logps = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    possible = logps > -jnp.inf
    # Replaced where p = 0: 0 * -inf would be NaN, in the value or in its gradient.
    safe = jnp.where(possible, logps, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(safe), 0.0) * safe, axis=-1)
