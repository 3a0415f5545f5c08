"""The benchmark of learning from preferences: the line that a side prints, the pairs of a step, and the table."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from experiments.bench import preferences
from experiments.bench.preferences_contract import Run, Settings, pairs_of_steps
from experiments.bench.preferences_prepare import pair_of
from posttrain_jax.data.chat import Encoded
from posttrain_jax.data.preference_groups import Group
from posttrain_jax.data.preferences import Comparison

STORED = pathlib.Path(__file__).with_name("preferences_runs.json")


def a_run() -> dict[str, object]:
    return json.loads(STORED.read_text("utf-8"))["runs"]["dpo"]["jax"][0]


def test_a_sides_last_line_is_its_run():
    run = Run.parse("a library says something\n" + json.dumps(a_run()) + "\n")
    assert (run.side, run.setting, run.pairs, run.seconds) == ("jax", "dpo", [4, 4, 4], [10.0, 2.0, 2.0])


@pytest.mark.parametrize("text", ["", '{"side": "jax"}', "3"])
def test_what_is_not_a_run_is_refused(text):
    with pytest.raises(ValueError, match="last line is not a run"):
        Run.parse(text)


def test_a_run_with_a_step_missing_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\] entries"):
        Run.parse(json.dumps(a_run() | {"loss": [0.7, 0.6]}))


def test_steps_go_through_the_pairs_and_begin_again():
    settings = Settings(pathlib.Path(), "dpo", 2, 3, first=5, threads=2, variant="", prepare=False)
    assert pairs_of_steps(settings, 7) == [[5, 6, 0], [1, 2, 3]]


def group(chosen_mask: list[int], rejected_mask: list[int]) -> Group:
    """The prompt 1 2 with the answers 3 4 9 and 5 9, what a template writes after them (7), rejected first."""
    chosen = Encoded(np.asarray([1, 2, 3, 4, 9, 7], np.int32), np.asarray(chosen_mask, bool))
    rejected = Encoded(np.asarray([1, 2, 5, 9, 7], np.int32), np.asarray(rejected_mask, bool))
    comparison = Comparison(better=1, worse=0, weight=1.0, margin=0.0, probability=1.0)
    none = np.zeros(0)
    return Group(0, (rejected, chosen), 0, 1, (comparison,), np.asarray([1, 0]), none, none)


def test_a_pair_is_what_pytorch_trainers_train():
    pair = pair_of(group([0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0]))
    assert pair.chosen[pair.prompt : pair.chosen_trained] == [3, 4, 9]
    assert pair.rejected[pair.prompt : pair.rejected_trained] == [5, 9]
    assert pair.tokens == 6 + 5


def test_a_pair_that_they_cannot_train_alike_is_refused():
    with pytest.raises(ValueError, match="one trained stretch"):
        pair_of(group([0, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0]))


def test_the_table_of_stored_runs(tmp_path):
    """Two steps of 4 pairs in 4 s and 8 s are 2 and 1 pairs/s, 1.5 at the median, (2 - 1) / 1.5 = 67 % apart.

    TRL's 16 s and 20 s are 0.5 and 0.4 pairs/s, 0.45 at the median. By round 4 and 2.5 times, 3.25 at the median.
    Places: 2048 / 4 = 512 and 2400 / 4 = 600 a pair. The worst loss of step 3 is 0.60 against 0.625: 4 %.
    """
    runs, about = preferences.read(STORED)
    preferences.write(tmp_path, "table", runs, about)
    assert json.loads((tmp_path / "table.json").read_text("utf-8")) == json.loads(STORED.read_text("utf-8"))
    text = (tmp_path / "table.md").read_text("utf-8")
    assert "| DPO | posttrain_jax | 1.500 | 67 % | 750.0 | 512 | 3.00 | 12.0 |" in text
    assert "| DPO | TRL, 1 pair at once | 0.450 | 22 % | 225.0 | 600 | 6.00 | 12.0 |" in text
    assert "3.25x the pairs per second (2.50 to 4.00 in a round" in text
    assert "0.50x the peak memory" in text
    assert (
        "loss of step 3 against TRL, relative difference: at most 4.0e-02 (tolerance 0.001, **not met**)"
        in text
    )
    assert "loss of the first step minus log 2, TRL: at most 1.0e-05 (tolerance 0.0001)" in text
