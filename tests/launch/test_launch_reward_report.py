"""launch.reward_report: what a run held out, further splits, ensembles; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from algorithms.tiny import untrained_reward_run
from ml_collections import ConfigDict
from tasks import task_of
from tiny_model import launch, save_tiny_model

from configs.reward_model.smollm2_135m import get_config
from launch.export import export
from launch.reward_report import IN_DISTRIBUTION, Options, read_sections, report
from posttrain_jax.core.errors import InputError

RATED = [
    {
        "prompt": [{"role": "user", "content": f"Number {i}?"}],
        "completions": ["It is even.", "It is odd, I think.", "No."],
        "ratings": [{"ann": i % 3, "bob": 1}, {"ann": 1, "bob": 2}, {"ann": 0, "bob": 0}],
    }
    for i in range(6)
]


def config_of(**reward) -> ConfigDict:
    config = get_config("tiny")
    config.mesh.data = config.train.rows_per_step = config.eval.batch_rows = 8
    config.seed = 3
    for name, value in reward.items():
        config.reward[name] = value
    return config


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rated(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rated") / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in RATED))
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single") / "run"
    return workdir, untrained_reward_run(config_of(), workdir)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ensemble") / "run"
    config = config_of(members=3)
    config.model.lora.rank = 2
    return workdir, untrained_reward_run(config, workdir)


@pytest.mark.slow
def test_an_ensemble_on_what_its_run_held_out_and_on_others(ensemble, rated, tmp_path, capsys):
    """The run's own evaluation is of the same rows, so accuracy and loss are the same.

    In RATED the means of ann and bob are 0.5, 1.5, 0 where i % 3 = 0; 1, 1.5, 0 where it is 1; 1.5, 1.5, 0 where it is
    2, which leaves a pair out: 2 x (3 + 3 + 2) = 16 pairs. Ann alone (0, 1, 0; 1, 1, 0; 2, 1, 0) has a tie in one of
    the first three pairs and in one of the second: 4 in all.
    """
    workdir, metrics = ensemble
    options = Options(
        str(workdir), str(tmp_path / "out"), out_of_distribution=(f"rated={rated}",), resamples=50
    )
    result = report(options)
    first, second = (result["splits"][name] for name in (IN_DISTRIBUTION, "rated"))
    assert first["accuracy"]["value"] == pytest.approx(metrics["eval/reward_accuracy"])
    assert first["loss"] == pytest.approx(metrics["eval/loss"], rel=1e-5)
    assert first["mean_margin"] == pytest.approx(metrics["eval/margins"], rel=1e-4)
    assert first["pairs"] == 6
    assert first["disagreement"]["members"] == 3
    assert (second["pairs"], second["groups"]) == (16, 6)
    assert second["raters"]["ann"]["pairs"] + second["raters"]["ann"]["ties"] == 16
    assert second["raters"]["ann"]["ties"] == 4
    assert "by_label_margin" in second
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"- model: {workdir}, step 0\n- ensemble: 3 members, combined by mean\n" in text
    assert "configs/tiny/pairs.jsonl, held out by split:6 with seed 3" in text
    assert (tmp_path / "out" / "calibration.png").is_file()
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == [IN_DISTRIBUTION] * 6 + ["rated"] * 16
    assert rows[0]["row"].startswith("configs/tiny/pairs.jsonl:") and rows[6]["row"] == f"{rated}:1"
    spreads = [row["margin_std"] for row in rows[:6]]
    assert np.mean(spreads) == pytest.approx(first["disagreement"]["mean_std"], rel=1e-5)
    wins = [row["chosen_score"] > row["rejected_score"] for row in rows[6:]]
    assert np.mean(wins) == pytest.approx(second["accuracy"]["value"])
    said = capsys.readouterr().out
    assert "split" in said and f"{IN_DISTRIBUTION}  6      " in said
    doubting = report(
        Options(str(workdir), str(tmp_path / "min"), combine="uncertainty", coefficient=2.0, resamples=0)
    )
    assert doubting["about"]["ensemble"] == "3 members, combined by uncertainty (2 times the variance)"
    assert doubting["splits"][IN_DISTRIBUTION]["loss"] != first["loss"]
    spread = doubting["splits"][IN_DISTRIBUTION]["disagreement"]["mean_std"]
    assert spread == pytest.approx(first["disagreement"]["mean_std"], rel=1e-5)


def test_an_export_with_the_data_named_gives_the_same(single, tmp_path):
    """Also from the command line, and with the model's file alone: the same rows are held out."""
    workdir, metrics = single
    export(str(workdir), tmp_path / "exported")
    done = launch(
        "reward_report",
        f"--model={tmp_path}/exported",
        "--data=configs/tiny/pairs.jsonl",
        "--held_out=split:0.2",
        "--seed=3",
        f"--out={tmp_path}/out",
        "--resamples=20",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads((tmp_path / "out" / "report.json").read_text())["splits"][IN_DISTRIBUTION]
    assert result["loss"] == pytest.approx(metrics["eval/loss"], rel=1e-4)
    assert "disagreement" not in result
    refused = launch("reward_report", f"--model={workdir}")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --model and --out are needed; an example: python -m launch.rew")


def test_subsets_and_their_sections(single, tmp_path):
    """Sections count their subsets' pairs; two sections count alike, as in RewardBench."""
    rows = [
        {"prompt": f"{i} ", "chosen": "yes", "rejected": "no", "subset": name}
        for i, name in enumerate("aaab" * 2 + "c")
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = tmp_path / "sections.json"
    sections.write_text(json.dumps({"first": ["a", "b"], "second": ["c"]}))
    options = Options(
        str(single[0]),
        str(tmp_path / "out"),
        data=str(tmp_path / "bench.jsonl"),
        out_of_distribution=("pairs=configs/tiny/pairs.jsonl",),
        sections=str(sections),
        resamples=10,
    )
    whole = report(options)["splits"]
    assert "sections" not in whole["pairs"]
    result = whole[IN_DISTRIBUTION]
    found = {name: part["accuracy"]["value"] for name, part in result["subsets"].items()}
    assert [part["pairs"] for part in result["subsets"].values()] == [6, 2, 1]
    first = (6 * found["a"] + 2 * found["b"]) / 8
    scores = {name: score["value"] for name, score in result["sections"].items()}
    assert scores == pytest.approx(
        {"first": first, "second": found["c"], "overall": (first + found["c"]) / 2}
    )
    sections.write_text(json.dumps({"first": {"a": 1, "b": 3}}))
    weighted = report(dataclasses.replace(options, out_of_distribution=()))["splits"][IN_DISTRIBUTION]
    assert weighted["sections"]["first"]["value"] == pytest.approx((found["a"] + 3 * found["b"]) / 4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([], "holds something else"),
        ({"S": []}, "the section 'S' is no list of subsets"),
        ({"S": {}}, "the section 'S' is no list of subsets"),
        ({"S": {"a": 0}}, "the section 'S' is no list of subsets"),
        ({"S": ["a", 1]}, "the section 'S' is no list of subsets"),
        ({"S": {"a": 1}, "T": {"a": 2}}, "the subset 'a' has two counts, 1 and 2"),
    ],
)
def test_sections_that_make_no_sense(sections, message, tmp_path):
    (tmp_path / "sections.json").write_text(json.dumps(sections))
    with pytest.raises(InputError, match=message):
        read_sections(str(tmp_path / "sections.json"))


def test_losses_of_scores_of_variance_1_are_of_the_scale_of_training(tmp_path):
    """The run's own evaluation has the same loss, also before its scores were rescaled."""
    config = config_of(normalize="unit")
    metrics = untrained_reward_run(config, tmp_path / "run")
    task = task_of(config, tmp_path / "run")
    assert task.evaluate is not None
    assert metrics["eval/loss"] == pytest.approx(task.evaluate(task.init_state())["eval/loss"], rel=1e-4)
    result = report(Options(str(tmp_path / "run"), str(tmp_path / "out"), resamples=0))
    part = result["splits"][IN_DISTRIBUTION]
    assert part["loss"] == pytest.approx(metrics["eval/loss"], rel=1e-4)
    assert abs(part["mean_margin"] - metrics["eval/margins"]) > 1e-3
    assert "margins divided by the scores' gain" in result["about"]["scale"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sections": "no/such.json"}, "--sections=no/such.json cannot be read"),
        ({"held_out": "split:5"}, "--held_out is a part of --data"),
        ({"data": "x.jsonl", "held_out": "60"}, "--held_out is '60'; write split:60"),
        ({"out_of_distribution": ("rows.jsonl",)}, "'rows.jsonl' is not NAME=DATA"),
        ({"out_of_distribution": ("a=x", "a=y")}, "two splits are called 'a'"),
        ({"out_of_distribution": ("in_distribution=x",)}, "two splits are called"),
        ({"data": "no/such.jsonl"}, "no/such.jsonl"),
        ({"combine": "max"}, "combine is 'max'"),
        ({"batch_rows": 0}, "--batch_rows is 0"),
        ({"resamples": -1}, "--resamples is -1"),
        ({"seed": -1}, "--seed is -1; it must be 0 or more"),
        ({"data": "configs/tiny/chats.jsonl"}, "a preference needs chosen"),
    ],
)
def test_bad_flags(single, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        report(Options(str(single[0]), str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_reported_on(single, tmp_path):
    save_tiny_model(tmp_path / "language")
    with pytest.raises(InputError, match="language has no score head"):
        report(Options(str(tmp_path / "language"), str(tmp_path / "out"), data="configs/tiny/pairs.jsonl"))
    rows = tmp_path / "labels.jsonl"
    rows.write_text('{"prompt": "p", "completion": "c", "label": true}\n')
    with pytest.raises(InputError, match=r"'labels' \(.*labels.jsonl\) holds no comparison"):
        report(Options(str(single[0]), str(tmp_path / "out"), out_of_distribution=(f"labels={rows}",)))
    export(str(single[0]), tmp_path / "exported")
    with pytest.raises(InputError, match="exported is no workdir, so it names no data"):
        report(Options(str(tmp_path / "exported"), str(tmp_path / "out")))
