"""Reward functions of the tests of scores; they run in worker processes."""

from __future__ import annotations

import random

from posttrain_jax.rewards.completion import Completion


def negative_length(answers: list[Completion]) -> list[float]:
    """Minus the number of tokens."""
    return [-float(len(answer.token_ids)) for answer in answers]


def drawn(answers: list[Completion]) -> list[float]:
    """A number that is another one at every call; the answer of token 0 fails."""
    if any(answer.token_ids == (0,) for answer in answers):
        raise ValueError("no")
    return [random.random() for _ in answers]


def length_without_x(answers: list[Completion]) -> list[float]:
    """The number of tokens; fails at an x."""
    if any("x" in answer.text for answer in answers):
        raise ValueError("an x")
    return [float(len(answer.token_ids)) for answer in answers]


def wrong_column(answers: list[Completion]) -> list[float]:
    """Fails at every answer whose row has no column "solution"."""
    return [float(answer.row["solution"]) for answer in answers]
