"""When a run ends early."""

from __future__ import annotations

import pytest

from posttrain_jax.run.stop_rules import StopRules

GOLD = {"eval/gold": 0.5, "eval/gold_standard_error": 0.1}


@pytest.mark.parametrize(
    ("rules", "values", "words"),
    [
        ({"kl": 10.0}, {"train/kl_per_sequence": 10.5}, "train/kl_per_sequence is 10.5, above stop.kl=10"),
        ({"kl": 10.0}, {"train/kl_per_sequence": 9.5}, ""),
        ({"kl": 10.0}, {"eval/score": 1.0}, ""),
        (
            {},
            {"train/kl_per_sequence": 1e9, "train/entropy_per_token": 0.0, "train/repeated_4gram_share": 1.0},
            "",
        ),
        (
            {"entropy": 0.2},
            {"train/entropy_per_token": 0.1},
            "train/entropy_per_token is 0.1, below stop.entropy=0.2",
        ),
        ({"entropy": 0.2}, {"train/entropy_per_token": 0.3}, ""),
        (
            {"repetition": 0.5},
            {"train/repeated_4gram_share": 0.6},
            "train/repeated_4gram_share is 0.6, above stop.repetition=0.5",
        ),
        # The best is 0.8: 3 standard errors of 0.1 above 0.5, which is allowed with 3.1 and not with 2.
        (
            {"gold_errors": 2.0},
            GOLD,
            "eval/gold is 0.5, more than stop.gold_errors=2 standard errors below its best",
        ),
        ({"gold_errors": 3.1}, GOLD, ""),
    ],
)
def test_what_ends_a_run(rules, values, words):
    reason = StopRules(**rules).reason(values, {"eval/gold": 0.8})
    assert reason.startswith(words) and bool(reason) == bool(words)
