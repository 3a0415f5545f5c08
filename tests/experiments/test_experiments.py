"""Every experiment runs in its tiny form, as a real process, and writes what its README shows."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from entry_points import run
from ml_collections import ConfigDict

from experiments.kto_smollm2 import run as kto_smollm2

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_tiny(name: str, folder: pathlib.Path, *flags: str) -> None:
    ended = run(f"experiments.{name}.run", *flags, f"--workdir={folder / 'run'}", f"--out={folder / 'out'}")
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_base_to_assistant_runs_tiny_and_records_answers(tmp_path):
    run_tiny("base_to_assistant", tmp_path, "--variant=tiny")
    result = json.loads((tmp_path / "out" / "answers.json").read_text("utf-8"))
    assert result["steps"] == 4
    assert set(result["held_out_loss"]) == {"0", "2", "4"}
    assert [answer["prompt"] for answer in result["answers"]] == ["What is the capital of France?"]
    assert (tmp_path / "out" / "answers.md").read_text("utf-8").startswith("| prompt | before | after |")


@pytest.mark.slow
def test_dpo_smollm2_runs_tiny_and_records_its_numbers(tmp_path):
    run_tiny("dpo_smollm2", tmp_path, "--variant=tiny")
    result = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    assert (result["steps"], result["held_out_pairs"]) == (4, 6)
    assert abs(result["before"]["loss"] - 0.6931) < 1e-4
    assert result["after"]["loss"] < 0.6
    low, high = result["accuracy_interval"]
    assert 0 <= low <= result["after"]["reward_accuracy"] <= high <= 1


@pytest.mark.slow
def test_kto_smollm2_runs_tiny_and_records_its_numbers(tmp_path):
    """The area is of the same rewards whose means the run's last evaluation wrote."""
    run_tiny("kto_smollm2", tmp_path, "--variant=tiny")
    result = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    assert result["steps"] == 4 and result["held_out"] == {"good": 3, "bad": 3}
    assert result["before"]["loss"] == 0.5 > result["after"]["loss"]
    low, high = result["area_interval"]
    assert 0 <= low <= result["area_under_curve"] <= high <= 1
    config = ConfigDict(json.loads((tmp_path / "run" / "config.json").read_text("utf-8")))
    config.train.rows_per_step = config.train.micro_rows = config.eval.batch_rows = 8  # as many as devices
    good, bad = kto_smollm2.held_out_rewards(config, tmp_path / "run")
    after = result["after"]
    assert good.mean() == pytest.approx(after["rewards/chosen"], abs=1e-4)
    assert bad.mean() == pytest.approx(after["rewards/rejected"], abs=1e-4)


def test_the_area_counts_pairs_of_a_good_and_a_bad_completion():
    """Good 2 and 0, bad 1 and 0: of four pairs two are right and one is a tie. In one draw of 16 the good ones are
    0 alone and the bad ones 1 alone (area 0), in four the good ones are 2 alone (area 1)."""
    area = kto_smollm2.area_under_curve(np.array([2.0, 0.0]), np.array([1.0, 0.0]))
    assert (area.value, area.low, area.high) == (2.5 / 4, 0.0, 1.0)
    apart = kto_smollm2.area_under_curve(np.array([2.0, 3.0]), np.array([1.0, 0.0, -1.0]))
    assert (apart.value, apart.low, apart.high) == (1.0, 1.0, 1.0)


def test_the_readme_of_dpo_smollm2_says_what_was_recorded():
    folder = ROOT / "experiments" / "dpo_smollm2"
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    recorded = json.loads((folder / "result.json").read_text("utf-8"))
    readme = (folder / "README.md").read_text("utf-8")
    after = recorded["after"]
    assert expected == {
        "held_out_loss_before": recorded["before"]["loss"],
        "held_out_loss_after": after["loss"],
        "reward_accuracy_after": after["reward_accuracy"],
        "accuracy_interval": recorded["accuracy_interval"],
        "steps": recorded["steps"],
    }
    low, high = (100 * end for end in recorded["accuracy_interval"])
    quoted = f"{100 * after['reward_accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"
    assert quoted in readme and f"{after['loss']:.4f}" in readme


def test_the_readme_of_kto_smollm2_says_what_was_recorded():
    folder = ROOT / "experiments" / "kto_smollm2"
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    recorded = json.loads((folder / "result.json").read_text("utf-8"))
    readme = (folder / "README.md").read_text("utf-8")
    assert expected == {
        "held_out_loss_before": recorded["before"]["loss"],
        "held_out_loss_after": recorded["after"]["loss"],
        "area_under_curve": recorded["area_under_curve"],
        "area_interval": recorded["area_interval"],
        "steps": recorded["steps"],
    }
    low, high = recorded["area_interval"]
    assert f"{recorded['area_under_curve']:.3f} (95 % interval {low:.3f} to {high:.3f};" in readme
    assert f"| loss | {recorded['before']['loss']:.4f} | {recorded['after']['loss']:.4f} |" in readme


def test_recorded_numbers_are_those_of_the_recorded_run():
    """The README of base_to_assistant quotes expected.json, which holds what answers.json recorded."""
    folder = ROOT / "experiments" / "base_to_assistant"
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    recorded = json.loads((folder / "answers.json").read_text("utf-8"))
    losses = list(recorded["held_out_loss"].values())
    assert (expected["held_out_loss_before"], expected["held_out_loss_after"]) == (losses[0], losses[-1])
    assert expected["stopped_by_itself"] == recorded["stopped_by_itself"]
    text = (folder / "README.md").read_text("utf-8")
    for number in losses[:1] + losses[-1:]:
        assert f"{number:.4f}" in text


@pytest.mark.slow
def test_reward_models_runs_tiny_and_records_both_reports(tmp_path):
    run_tiny("reward_models", tmp_path, "--tiny")
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert {name: set(splits) for name, splits in results.items()} == {
        "single": {"in_distribution", "pairs"},
        "ensemble": {"in_distribution", "pairs"},
    }
    assert [results[name]["in_distribution"]["pairs"] for name in results] == [6, 6]
    assert len(results["ensemble"]["pairs"]["member_accuracy"]) == 2
    lines = (tmp_path / "out" / "results.md").read_text("utf-8").splitlines()
    assert lines[0].startswith("| model | split | pairs | accuracy")
    assert len(lines) == 2 + 4
    for name in results:
        assert (tmp_path / "run" / f"{name}-report" / "calibration.png").is_file()


def test_the_readme_of_reward_models_says_what_was_recorded():
    """Its table is results.md, and expected.json the accuracies in results.json; if nothing was run yet, it says so."""
    folder = ROOT / "experiments" / "reward_models"
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    text = (folder / "README.md").read_text("utf-8")
    if expected == {"status": "not run yet"}:
        assert "**not run yet**" in text
        assert not (folder / "results.json").exists()
        return
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert expected == {
        name: {split: found["accuracy"]["value"] for split, found in splits.items()}
        for name, splits in results.items()
    }
    assert (folder / "results.md").read_text("utf-8") in text
    assert "not run yet" not in text


@pytest.mark.slow
def test_ppo_letters_runs_short_and_records_its_table(tmp_path):
    run_tiny("ppo_letters", tmp_path, "--seeds=1", "--steps=2", "--coefficients=0.1")
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert {name: len(runs) for name, runs in results["learnt"].items()} == {"ppo": 1, "rloo": 1}
    assert results["learnt"]["ppo"][0]["iterations_to_95"] is None
    assert list(results["by_kl_coefficient"]) == ["0.1"]
    assert "| PPO | 0 |" in (tmp_path / "out" / "results.md").read_text("utf-8")


@pytest.mark.slow
def test_ppo_sentiment_runs_tiny_and_records_its_numbers(tmp_path):
    run_tiny("ppo_sentiment", tmp_path, "--variant=tiny")
    result = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    assert result["iterations"] == 4 and len(result["train"]) == 4
    low, high = result["rise_interval"]
    assert low <= result["rise"] <= high
    assert result["rise"] == pytest.approx(result["after"]["score"] - result["before"]["score"], abs=1e-3)
    assert len((tmp_path / "out" / "samples.md").read_text("utf-8").splitlines()) == 2 + 2
    assert (tmp_path / "out" / "curves.png").is_file()


def test_the_readmes_of_ppo_say_what_was_recorded():
    for name, table in (("ppo_letters", "results.md"), ("ppo_sentiment", "samples.md")):
        folder = ROOT / "experiments" / name
        assert (folder / table).read_text("utf-8") in (folder / "README.md").read_text("utf-8")
    letters = json.loads((ROOT / "experiments" / "ppo_letters" / "results.json").read_text("utf-8"))
    assert json.loads((ROOT / "experiments" / "ppo_letters" / "expected.json").read_text("utf-8")) == {
        name: min(run["score_after"] for run in runs) for name, runs in letters["learnt"].items()
    }
    kls = [run["last_train_kl"] for run in letters["by_kl_coefficient"].values()]
    assert kls == sorted(kls, reverse=True)
    folder = ROOT / "experiments" / "ppo_sentiment"
    result = json.loads((folder / "result.json").read_text("utf-8"))
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    assert expected == {name: result[name] for name in ("iterations", "rise", "rise_interval")}
    readme = (folder / "README.md").read_text("utf-8")
    for name in ("result.json", "result_seed1.json"):
        result = json.loads((folder / name).read_text("utf-8"))
        low, high = result["rise_interval"]
        assert f"{result['rise']:.2f} (95 % {low:.2f} to {high:.2f})" in readme
