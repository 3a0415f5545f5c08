"""From scores to what an action is worth: rewards per token, returns, advantages and baselines.

Entry t of `[B, T]` arrays is one action, the drawing of one token of the completion: its reward, its log-probability,
and its value V(s_t), which is that of the text before the token. `mask_BT` is non-zero on the completion's tokens,
wherever in the row they stand. What is masked is passed over as if it were not there (so the action after a gap is the
next one), may hold anything, NaN included, and comes out as 0. After the last action the value is 0, for a completion
that was cut off too. A row holds one completion: packed completions would be one episode here.

All arrays of a call have one shape (else ValueError); results are float32. Letter of this file: K completions to a
prompt.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array
from posttrain_jax.losses.kl import k1
from posttrain_jax.losses.weighted_rows import rows_of_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Advantages:
    """What `gae` returns, both float32 `[B, T]` and 0 where masked.

    Attributes:
      advantages_BT: how much better the action was than the value expected.
      returns_BT: the target of the value function, advantages + values.
    """

    advantages_BT: Array
    returns_BT: Array


def gae(
    rewards_BT: Array, values_BT: Array, mask_BT: Array, *, gamma: float | Array, lam: float | Array
) -> Advantages:
    """Generalized advantage estimation: A_t = sum_l (gamma lam)^l delta_{t+l}.

    arXiv:1506.02438, eq. 16, with delta_t = r_t + gamma V_{t+1} - V_t, and V = 0 after the last action. At
    gamma = lam = 1 it is the reward to go minus the value; at lam = 0 it is delta. Nothing is whitened here
    (`masking.whiten_biased`), and the returns are those of the advantages before any whitening.

    Args:
      rewards_BT: one reward per action, as from `per_token_rewards`.
      values_BT: V(s_t), the value before the action.
      mask_BT: non-zero on actions.
      gamma: discount per token.
      lam: lambda in [0, 1], from low variance to low bias.
    """
    actions = rows_of_mask(mask_BT)
    rewards_BT, values_BT = actions.keep(rewards_BT), actions.keep(values_BT)

    def step(
        later: tuple[Array, Array], now: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        later_advantage_B, later_value_B = later
        reward_B, value_B, weight_B = now
        delta_B = reward_B + gamma * later_value_B - value_B
        advantage_B = delta_B + gamma * lam * later_advantage_B
        kept = (
            jnp.where(weight_B != 0, advantage_B, later_advantage_B),
            jnp.where(weight_B != 0, value_B, later_value_B),
        )
        return kept, jnp.where(weight_B != 0, advantage_B, 0.0)

    nothing_B = jnp.zeros(rewards_BT.shape[:1], jnp.float32)
    per_step = (rewards_BT.T, values_BT.T, actions.weights_B.T)
    _, advantages_TB = jax.lax.scan(step, (nothing_B, nothing_B), per_step, reverse=True)
    return Advantages(advantages_BT=advantages_TB.T, returns_BT=advantages_TB.T + values_BT)


def discounted_returns(rewards_BT: Array, mask_BT: Array, *, gamma: float | Array) -> Array:
    """G_t = r_t + gamma G_{t+1}, float32 `[B, T]`: the reward to go at gamma = 1.

    Returns without a value function, for REINFORCE (`policy_gradient.token_loss`).

    Args:
      rewards_BT: one reward per action.
      mask_BT: non-zero on actions.
      gamma: discount per token.
    """
    return gae(rewards_BT, jnp.zeros_like(rewards_BT), mask_BT, gamma=gamma, lam=1.0).returns_BT


def leave_one_out(rewards_BK: Array, mask_BK: Array | None = None) -> Array:
    """The baseline of RLOO: for each of K completions the mean reward of the K - 1 others, float32 `[B, K]`.

    arXiv:2402.14740 (Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"). The reward minus this
    baseline is K / (K - 1) times the reward minus the mean of all K. Completions of equal reward have exactly that
    reward as their baseline, and so an advantage of exactly 0: the differences are summed, not the rewards.

    Args:
      rewards_BK: one reward per completion; K completions to the same prompt in a row.
      mask_BK: non-zero on the completions that have a reward; None = all. The others are nobody's baseline, have the
        baseline 0, and may hold anything. A completion that is alone with a reward has its own as the baseline.

    Raises:
      ValueError: K < 2, where there are no others.
    """
    rewards_BK = jnp.asarray(rewards_BK).astype(jnp.float32)
    completions = rewards_BK.shape[-1]
    if completions < 2:
        raise ValueError(
            f"A baseline from the other completions needs 2 completions to a prompt; there is {completions}."
        )
    has_reward_BK = jnp.ones(rewards_BK.shape, bool) if mask_BK is None else mask_BK != 0
    rewards_BK = jnp.where(has_reward_BK, rewards_BK, 0.0)
    above_BKK = jnp.where(
        has_reward_BK[..., None, :], rewards_BK[..., :, None] - rewards_BK[..., None, :], 0.0
    )
    others_BK = jnp.sum(has_reward_BK, axis=-1, keepdims=True) - has_reward_BK
    baselines_BK = rewards_BK - jnp.sum(above_BKK, axis=-1) / jnp.maximum(others_BK, 1)
    return jnp.where(has_reward_BK, baselines_BK, 0.0)


def per_token_rewards(
    scores_B: Array,
    policy_logps_BT: Array,
    reference_logps_BT: Array,
    mask_BT: Array,
    *,
    kl_coefficient: float | Array,
) -> Array:
    """r_t = -beta (log pi(y_t) - log pi_ref(y_t)), plus the completion's score at its last token; float32 `[B, T]`.

    Ziegler et al. (arXiv:1909.08593) and InstructGPT (arXiv:2203.02155, eq. 2 and C.4): the penalty is k1 of every
    token, the score stands at the end. A row without any action gets 0 everywhere.

    Args:
      scores_B: one score per completion, from a reward model or a verifier.
      policy_logps_BT: log-probabilities under the policy that drew the tokens, nats.
      reference_logps_BT: the same under the reference.
      mask_BT: non-zero on actions, the end-of-text token among them.
      kl_coefficient: beta; a scalar, which may be traced (see `kl.adapted_kl_coefficient`).

    Raises:
      ValueError: shapes that do not fit.
    """
    actions = rows_of_mask(mask_BT)
    is_action_BT = actions.weights_B != 0
    if jnp.shape(scores_B) != is_action_BT.shape[:1]:
        raise ValueError(
            f"A mask of shape {is_action_BT.shape} needs one score per row; there are scores of shape "
            f"{jnp.shape(scores_B)}."
        )
    # From the last action on there is one action.
    remaining_BT = jnp.cumsum(is_action_BT[:, ::-1], axis=1)[:, ::-1]
    is_last_BT = is_action_BT & (remaining_BT == 1)
    penalty_BT = kl_coefficient * k1(actions.keep(policy_logps_BT), actions.keep(reference_logps_BT))
    score_BT = jnp.where(is_last_BT, jnp.asarray(scores_B).astype(jnp.float32)[:, None], 0.0)
    return score_BT - penalty_BT
