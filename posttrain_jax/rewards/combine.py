"""From several scores of a completion to one reward: sums, the safety rule of Llama 2, lengths, missing ends, clipping.

Pure functions of arrays, float32 from end to end; they run under jit and on host arrays alike. `scores_B` is one number
per completion, `lengths_B` its tokens with the token that ended it, `ended_B` whether the model ended it itself.
ValueError where shapes differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import Array

Scores = Array | np.ndarray


def weighted_sum(components: Mapping[str, Scores], weights: Mapping[str, float]) -> Array:
    """sum_i w_i r_i of named components, `[B]`; added in the order of the names, so that no bit depends on a dict.

    Raises:
      InputError: a component without a weight, a weight without a component, or no components.
    """
    if set(components) != set(weights) or not components:
        raise InputError(
            f"The reward's weights are for {_names(weights)}, its components are {_names(components)}; give each "
            "component a weight."
        )
    total = None
    for name in sorted(components):
        term = jnp.float32(weights[name]) * _float32(components[name])
        total = term if total is None else _same(total, term)[0] + term
    assert total is not None
    return total


def piecewise_safety(
    safety_B: Scores, helpfulness_B: Scores, is_safety_B: Array | np.ndarray, *, threshold: float = 0.15
) -> Array:
    """Llama 2's choice between a safety and a helpfulness model, as log-odds: LOGIT(R_c), `[B]`.

    R_c = R_s if IS_SAFETY(p) or R_s < threshold, else R_h (arXiv:2307.09288, section 3.2.3). The paper
    writes R as probabilities and then takes their logit. Here both models' scores are log-odds from the start, and the
    threshold is turned into one: a float32 sigmoid is 1 from 17 on, and its logit infinite. Whiten
    what comes out (`masking.whiten_biased`).

    Args:
      safety_B, helpfulness_B: scores of the two models before the sigmoid, as Bradley-Terry trains them.
      is_safety_B: whether the prompt is one that was written to be unsafe.
      threshold: a probability; a completion that the safety model likes less counts as unsafe whatever the prompt.
    """
    if not 0.0 < threshold < 1.0:
        raise InputError(f"The safety threshold is {threshold}; write a probability between 0 and 1.")
    safety_B, helpfulness_B = _same(safety_B, helpfulness_B)
    is_safety_B = jnp.asarray(is_safety_B) != 0
    _check(safety_B, is_safety_B)
    return jnp.where(
        is_safety_B | (safety_B < math.log(threshold / (1.0 - threshold))), safety_B, helpfulness_B
    )


def clip(scores_B: Scores, *, low: float, high: float) -> Array:
    """Scores brought into [low, high], `[B]`.

    Raises:
      InputError: low is above high.
    """
    if not low <= high:
        raise InputError(f"The reward is to be clipped to [{low}, {high}]; write the lower limit first.")
    return jnp.clip(_float32(scores_B), low, high)


def length_penalty(lengths_B: Scores, *, free: int, per_token: float) -> Array:
    """-per_token * max(0, length - free), `[B]`: a term to be added to the score."""
    return -jnp.float32(per_token) * jnp.maximum(_float32(lengths_B) - free, 0.0)


def replace_unfinished(scores_B: Scores, ended_B: Array | np.ndarray, *, value: float = -1.0) -> Array:
    """The score, or `value` for a completion that the model did not end, `[B]`.

    The rule of Ziegler et al. (arXiv:1909.08593; there a completion ends with a '.', see `rollouts.sampling.truncate`)
    and the "EOS trick" of Huang et al. (arXiv:2403.17031, detail 23), both with -1.
    """
    scores_B = _float32(scores_B)
    ended_B = jnp.asarray(ended_B) != 0
    _check(scores_B, ended_B)
    return jnp.where(ended_B, scores_B, jnp.float32(value))


def penalize_unfinished(scores_B: Scores, ended_B: Array | np.ndarray, *, penalty: float) -> Array:
    """The score less `penalty` for a completion that the model did not end, `[B]`: their order is kept."""
    scores_B = _float32(scores_B)
    ended_B = jnp.asarray(ended_B) != 0
    _check(scores_B, ended_B)
    return jnp.where(ended_B, scores_B, scores_B - jnp.float32(penalty))


def _float32(values: Scores) -> Array:
    return jnp.asarray(values, jnp.float32)


def _same(first: Scores, second: Scores) -> tuple[Array, Array]:
    one, other = _float32(first), _float32(second)
    _check(one, other)
    return one, other


def _check(first: Array, second: Array) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"one array is {first.shape}, another {second.shape}; both are one value per completion"
        )


def _names(mapping: Mapping[str, object]) -> str:
    return ", ".join(sorted(mapping)) or "nothing"
