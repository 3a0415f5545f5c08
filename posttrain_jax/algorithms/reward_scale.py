"""The scale of a reward model's scores, which a comparison loss leaves open: set once, after the last step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import Array, PyTree, TrainState
from posttrain_jax.data.preference_groups import Group, PreferenceSource
from posttrain_jax.losses import reward as losses


def set_scale(
    state: TrainState,
    *,
    scores_of: Callable[[PyTree, PreferenceSource], np.ndarray],
    sources: Sequence[PreferenceSource],
    normalize: str,
) -> TrainState:
    """Sets every member's gain and bias from its scores of the training data; those of the EMA from the EMA's.

    Args:
      state: after the last step.
      scores_of: (whole parameters, source) -> the score of every completion by every member, `[S, E]`.
      sources: the training data.
      normalize: "demonstrations" or "unit", as `reward.normalize`.
    """

    def all_scores(params: PyTree) -> Array:
        """`[N, E]`: of the completions that the scale is set by, by every member."""
        taken = []
        for source in sources:
            scores_SE = scores_of(params, source)
            indices = [
                group.first_sequence + k
                for group in (source.group(i) for i in range(len(source)))
                for k in _scale_completions(group, normalize)
            ]
            taken.append(scores_SE[indices])
        return jnp.asarray(np.concatenate(taken))

    def rescaled(trained: PyTree) -> PyTree:
        scores_NE = all_scores(combine(trained, state.frozen))
        scale_of = functools.partial(_rescaled, normalize=normalize)
        if "members" not in trained:
            return {**trained, "score_head": _with_scale(trained["score_head"], scale_of, scores_NE[:, 0])}
        members = trained["members"]
        scale_of = jax.vmap(scale_of, in_axes=(0, 0, 1))
        return {"members": {**members, "score_head": _with_scale(members["score_head"], scale_of, scores_NE)}}

    prompts = sum(len(source) for source in sources)
    log_on_host0(f"Scores are normalized ({normalize}) over {prompts:,} prompts.")
    ema = rescaled(state.ema) if state.ema else state.ema
    return dataclasses.replace(state, params=rescaled(state.params), ema=ema)


def _rescaled(gain: Array, bias: Array, scores_N: Array, *, normalize: str) -> tuple[Array, Array]:
    """The gain and bias that move these scores, made with the old ones, to where `reward.normalize` puts them."""
    if normalize == "unit":
        scale = losses.gain_and_bias(scores_N)
        return scale.gain * gain, scale.gain * bias + scale.bias
    return gain, bias + losses.demonstration_bias(scores_N)


def _with_scale(head: PyTree, scale_of: Callable[..., tuple[Array, Array]], scores: Array) -> PyTree:
    """The head with a new gain and bias, in their places on the mesh."""
    gain, bias = scale_of(np.asarray(head["gain"]), np.asarray(head["bias"]), scores)
    return {
        **head,
        "gain": jax.device_put(gain, head["gain"].sharding),
        "bias": jax.device_put(bias, head["bias"].sharding),
    }


def _scale_completions(group: Group, normalize: str) -> list[int]:
    """The completions that the scale is set by: all, or those that no other was preferred to."""
    if normalize == "unit" or not group.comparisons:
        return list(range(len(group.sequences)))
    return np.flatnonzero(group.ranks == 0).tolist()
