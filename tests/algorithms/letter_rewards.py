"""Reward functions of the tests of PPO and RLOO; they run in worker processes."""

from __future__ import annotations

from posttrain_jax.rewards.completion import Completion


def a_good_d_bad(answers: list[Completion]) -> list[float]:
    """Of the model with the five tokens <end> a b c d: an a is worth 1, a d costs 1/2, to have ended is worth 1/2."""
    scores = []
    for answer in answers:
        letters = [token for token in answer.token_ids if token in (1, 4)]
        score = sum(1.0 if token == 1 else -0.5 for token in letters)
        scores.append(score + (0.5 if answer.finish_reason == "stop" else 0.0))
    return scores


def mean_token(answers: list[Completion]) -> list[float]:
    """The mean of an answer's token ids, of bytes: no two answers of a new model have quite the same."""
    return [sum(answer.token_ids) / max(len(answer.token_ids), 1) for answer in answers]
