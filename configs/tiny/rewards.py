"""Reward functions for experiments that take seconds, with an optimum that is known."""

from __future__ import annotations

from posttrain_jax.rewards.completion import Completion


def share_of_e(answers: list[Completion]) -> list[float]:
    """The share of an answer's characters that are "e"; at most 1."""
    return [answer.text.count("e") / max(len(answer.text), 1) for answer in answers]
