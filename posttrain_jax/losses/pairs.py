"""Pairs of completions under a policy and a reference: their log-ratios, and the metrics of a preference loss."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.nn import log_sigmoid

from posttrain_jax.core.types import Array, LossOutput, Metrics
from posttrain_jax.losses.weighted_rows import Rows, rows_like


def check_smoothing(label_smoothing: float, *, zero_allowed: bool = True) -> None:
    """Raises ValueError where the share of wrong labels is not in [0, 0.5) (in (0, 0.5) without `zero_allowed`)."""
    if not (0.0 < label_smoothing < 0.5 or (zero_allowed and label_smoothing == 0.0)):
        raise ValueError(
            f"label_smoothing is the share of wrong labels, {'0' if zero_allowed else 'more than 0'} to below 0.5; "
            f"it is {label_smoothing}."
        )


def soft_label_nll(logits_B: Array, probabilities_B: Array | float) -> Array:
    """-p log s(x) - (1 - p) log s(-x): the negative log-likelihood of a label that is 1 with probability p."""
    return -probabilities_B * log_sigmoid(logits_B) - (1.0 - probabilities_B) * log_sigmoid(-logits_B)


def pair_metrics(
    rows: Rows,
    chosen_rewards_B: Array,
    rejected_rewards_B: Array,
    chosen_logps_B: Array,
    rejected_logps_B: Array,
) -> Metrics:
    """The metrics of a preference loss, per pair, under the names of the DPO authors' code and TRL.

    `rewards/accuracies` is how often the chosen completion's reward is strictly above the rejected one's.
    """
    return {
        "rewards/chosen": rows.metric(chosen_rewards_B),
        "rewards/rejected": rows.metric(rejected_rewards_B),
        "rewards/margins": rows.metric(chosen_rewards_B - rejected_rewards_B),
        "rewards/accuracies": rows.metric((chosen_rewards_B > rejected_rewards_B).astype(jnp.float32)),
        "logps/chosen": rows.metric(chosen_logps_B),
        "logps/rejected": rows.metric(rejected_logps_B),
    }


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The log-ratios of a batch of pairs, float32, 0 where there is no pair.

    Attributes:
      rows: the pairs' weights.
      chosen_B: a_w = log pi_theta(y_w|x) / pi_ref(y_w|x).
      rejected_B: a_l, the same of y_l.
      policy_chosen_B: log pi_theta(y_w|x), for the metrics.
      policy_rejected_B: log pi_theta(y_l|x).
    """

    rows: Rows
    chosen_B: Array
    rejected_B: Array
    policy_chosen_B: Array
    policy_rejected_B: Array

    @property
    def difference_B(self) -> Array:
        """h = a_w - a_l."""
        return self.chosen_B - self.rejected_B

    def output(self, loss_B: Array, chosen_rewards_B: Array, rejected_rewards_B: Array) -> LossOutput:
        """The loss of pairs whose unweighted loss is `loss_B`, with the metrics of these rewards."""
        metrics = pair_metrics(
            self.rows, chosen_rewards_B, rejected_rewards_B, self.policy_chosen_B, self.policy_rejected_B
        )
        return self.rows.output(loss_B, metrics)

    def output_with_beta(self, loss_B: Array, beta: float) -> LossOutput:
        """`output` with the rewards of DPO, beta * a."""
        return self.output(loss_B, beta * self.chosen_B, beta * self.rejected_B)


def log_ratio_pairs(
    policy_chosen_logps_B: Array,
    policy_rejected_logps_B: Array,
    reference_chosen_logps_B: Array,
    reference_rejected_logps_B: Array,
    weights_B: Array | None,
) -> Pairs:
    """Pairs from log-probabilities of whole completions (nats, all of one shape, else ValueError) and their weights."""
    rows = rows_like(policy_chosen_logps_B, weights_B)
    policy_chosen_B = rows.keep(policy_chosen_logps_B)
    policy_rejected_B = rows.keep(policy_rejected_logps_B)
    return Pairs(
        rows=rows,
        chosen_B=policy_chosen_B - rows.keep(reference_chosen_logps_B),
        rejected_B=policy_rejected_B - rows.keep(reference_rejected_logps_B),
        policy_chosen_B=policy_chosen_B,
        policy_rejected_B=policy_rejected_B,
    )
