"""A reward function of the tests of scores; it runs in worker processes."""

from __future__ import annotations

from posttrain_jax.rewards.answer import Answer


def negative_length(answers: list[Answer]) -> list[float]:
    """Minus the number of tokens."""
    return [-float(len(answer.token_ids)) for answer in answers]
