"""What every algorithm owes the loop, on the step that it ships: one compiled step each, two steps, one checkpoint.

The numbers of the two steps are golden: `tests/contracts/golden_steps.json`.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from contracts.algorithm_steps import CONFIGS, Steps, golden_values, two_steps
from posttrain_jax.wiring.algorithms import ALGORITHMS

GOLDEN = pathlib.Path(__file__).with_name("golden_steps.json")
MAY_CHANGE = (
    "\n{name} is {now:.8g} and was {then:.8g}. If the commit is meant to change what {algorithm} computes (its loss, "
    "the order of its data, its random draws, its first parameters), say so in its message and write the file anew: "
    "python -m tests.contracts.write_golden_steps {algorithm}. If it is not, it has a mistake. The tolerance stays."
)

pytestmark = [pytest.mark.slow, pytest.mark.every_python]


def test_every_algorithm_is_here():
    assert CONFIGS.keys() == {*ALGORITHMS, "ppo", "rloo"} == json.loads(GOLDEN.read_text()).keys()


@pytest.fixture(scope="module", params=CONFIGS)
def algorithm(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def steps(algorithm: str, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return two_steps(algorithm, tmp_path_factory.mktemp(algorithm) / "run")


def test_the_second_step_is_not_traced_again(steps: Steps):
    """A state that a step gives back has the types and shardings of the one it took, and those that were promised."""
    assert steps.signatures[0] == steps.signatures[1] == steps.abstract


def test_the_state_is_donated(steps: Steps):
    assert all(steps.deleted)


def test_a_step_from_a_checkpoint_is_the_same_bit_for_bit(steps: Steps):
    jax.tree.map(np.testing.assert_array_equal, steps.resumed, steps.second)


def test_the_metrics_are_finite_and_both_steps_have_the_same(steps: Steps):
    first, second = steps.metrics
    assert first.keys() == second.keys() and any("loss" in name for name in first)
    assert all(np.isfinite(value) for value in (*first.values(), *second.values())), steps.metrics


def tolerance(name: str, golden: dict[str, Any]) -> float:
    """Relative 1e-3 of a loss or a gradient norm: another order of float32 sums moves them by 1e-6, the second step a
    little more. Of a parameter's change 2 % of its norm, for AdamW makes whole steps of gradients that are nearly 0."""
    if name.endswith("of the change"):
        return 0.02 * golden[f"{name.rsplit(',', 1)[0]}, norm of the change"]
    return 1e-3 * abs(golden[name]) + 1e-6


def test_the_steps_compute_what_they_did(algorithm: str, steps: Steps):
    golden, now = json.loads(GOLDEN.read_text())[algorithm], golden_values(steps)
    assert now.keys() == golden.keys()
    for name, then in golden.items():
        assert abs(now[name] - then) <= tolerance(name, golden), MAY_CHANGE.format(
            name=name, now=now[name], then=then, algorithm=algorithm
        )
