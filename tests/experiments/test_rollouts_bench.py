"""The benchmark of PPO and RLOO: the line that a side prints, and the table."""

from __future__ import annotations

import dataclasses
import json

import pytest

from experiments.bench.rollouts import parse_flags, per_second, ratio_line, report
from experiments.bench.rollouts_contract import Run

OURS = Run(
    side="jax",
    setting="ppo",
    together=8,
    episodes=[32, 32, 32],
    completion_tokens=[48.0, 47.0, 46.0],
    seconds=[60.0, 10.0, 6.0],
    kl=[0.0, 0.1, 0.2],
    parts={"generate": [9.0, 3.0, 1.0], "train": [50.0, 7.0, 5.0]},
    seconds_to_first=70.0,
    peak_rss_bytes=3_000_000_000,
    versions={"jax": "0"},
)
THEIRS = dataclasses.replace(
    OURS, side="trl", seconds=[20.0, 30.0, 34.0], parts={}, peak_rss_bytes=6_000_000_000
)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--settings=rloo,grpo", "unknown setting 'grpo'; known: ppo, rloo"),
        ("--sides=jax", "unknown side 'jax'; write jax_N or trl_N"),
        ("--rounds=0", "0 is not at least 1"),
        ("--iterations=1", "--iterations must be more than 1"),
    ],
)
def test_flags_that_no_run_can_have_are_refused(flag, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rollouts", flag])
    with pytest.raises(SystemExit) as refused:
        parse_flags()
    assert refused.value.code == 2
    assert said in capsys.readouterr().err


def test_a_sides_last_line_is_its_run():
    text = "a library says something\n" + json.dumps(dataclasses.asdict(OURS)) + "\n"
    assert Run.parse(text) == OURS
    with pytest.raises(ValueError, match="last line is not a run: 3"):
        Run.parse("3")


def test_the_first_iteration_is_not_in_the_rates():
    """64 episodes in 16 seconds, beside 64 in 64; half the memory; 4 seconds of 16 generate."""
    assert per_second(OURS) == 4.0
    line = ratio_line("ppo", {"jax_8": [OURS], "trl_8": [THEIRS]})
    assert (
        "4.00x the episodes per second (4.00 to 4.00 in a round; the bar is 2x), 0.50x the peak memory"
        in line
    )
    about = {"model": "m", "data": "d", "new_tokens": 48, "threads": 2, "rounds": 1, "iterations": 3}
    about |= {"command": "c", "date": "2026", "commit": "abc", "cpu": "x", "versions": "v"}
    text = report({"ppo": {"jax_8": [OURS], "trl_8": [THEIRS]}}, about)
    assert "| PPO | jax_8 | 4.000 | 0 % | 46.0 | 3.00 | 70.0 | generate 25 %, train 75 % |" in text
    assert "| PPO | trl_8 | 1.000 | 0 % | 46.0 | 6.00 | 70.0 |  |" in text
