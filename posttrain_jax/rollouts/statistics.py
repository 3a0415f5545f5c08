"""Numbers about completions as texts, whatever they are scored with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain_jax.rollouts.trajectory import Trajectory

REPEATED_TOKENS = 4  # n of the n-grams that `repetition` counts


def completion_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The share of completions without EOS, and the mean of their `repetition`."""
    return {
        "no_eos_share": float(np.mean([not one.ended for one in trajectories])),
        "repeated_4gram_share": float(np.mean([repetition(one.response) for one in trajectories])),
    }


def repetition(tokens: np.ndarray) -> float:
    """The share of a completion's runs of 4 tokens that stand in it before, between 0 and 1; 0 for a shorter one."""
    count = tokens.size - REPEATED_TOKENS + 1
    if count < 1:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, REPEATED_TOKENS)
    return 1.0 - len(np.unique(grams, axis=0)) / count
