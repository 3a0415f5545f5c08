"""Names of rewards in metrics."""

from __future__ import annotations

import pytest

from posttrain_jax.rewards.short_names import short_names


@pytest.mark.parametrize(
    ("rewards", "short"),
    [
        (["configs.tiny.rewards:share_of_e"], ["share_of_e"]),
        (["/data/runs/reward_model/", "asset:vader"], ["reward_model", "vader"]),
        (["runs/rm@200", "org/rm"], ["rm@200", "rm"]),
        (["runs/a/rm", "runs/b/rm", "m:f"], ["a/rm", "b/rm", "f"]),
        (["one:score", "two:score"], ["one/score", "two/score"]),
        (["rm", "runs/rm"], ["rm", "runs/rm"]),
        (["rm/", "rm"], ["rm/", "rm"]),
        (["/", "x"], ["/", "x"]),
        ([], []),
    ],
)
def test_short_names(rewards: list[str], short: list[str]):
    assert list(short_names(rewards).values()) == short
    assert list(short_names(rewards)) == rewards
