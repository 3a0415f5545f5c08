"""The progress line and `curves.png`: what an algorithm names is shown, and what no run writes does no harm."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from posttrain_jax.algorithms import dpo, kto, ppo, reward_model, rloo, sft
from posttrain_jax.run.curves import DEFAULT, plot_curves, read_metrics, read_panels, write_panels
from posttrain_jax.run.progress import progress_line

RATES = {"train/lr": 1e-4, "train/grad_norm": 2.0, "train/tokens_per_second": 1234.0}


@pytest.mark.parametrize(
    ("fields", "values", "line"),
    [
        (
            sft.PROGRESS,
            {**RATES, "train/loss": 1.5, "train/padding_share": 0.25, "train/mfu": 0.4, "train/skipped": 1.0},
            "step 3/10  loss 1.5000  lr 1.00e-04  grad norm 2.00  1,234 tokens/s  padding 25.0%  MFU 40.0%  skipped 1"
            "  ETA 1:01:01",
        ),
        (
            dpo.PROGRESS,
            {**RATES, "train/loss": 0.5, "train/rewards/accuracies": 0.75, "train/rewards/margins": 0.125},
            "step 3/10  loss 0.5000  accuracy 75.0%  margin 0.125  lr 1.00e-04  grad norm 2.00  1,234 tokens/s"
            "  ETA 1:01:01",
        ),
        (
            ppo.PROGRESS,
            {
                **RATES,
                "train/score": 0.5,
                "train/score_std": 0.25,
                "train/kl_per_sequence": 1.25,
                "train/entropy_per_token": 2.5,
                "train/completion_tokens": 17.2,
                "train/no_eos_share": 0.5,
                "train/seconds_generate": 3.21,
                "train/seconds_train": 4.0,
            },
            "step 3/10  score 0.500 ± 0.250  KL 1.250  entropy 2.50  17 tokens each  no EOS 50%  generate 3.2 s"
            "  learn 4.0 s  ETA 1:01:01",
        ),
    ],
    ids=["sft", "dpo", "ppo"],
)
def test_the_progress_line_shows_what_the_algorithm_names(fields, values: dict[str, float], line: str):
    assert progress_line(3, 10, fields, values, 3661) == line


def test_a_field_without_all_of_its_numbers_is_left_out():
    assert (
        progress_line(1, 2, ppo.PROGRESS, {"train/score": 1.0, "train/kl_per_sequence": 0.5}, 0)
        == "step 1/2  KL 0.500  ETA 0:00:00"
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[plt.Figure]:
    """The figures that were drawn, as they were when they were closed."""
    figures: list[plt.Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    plt.close("all")


def test_curves_are_drawn_from_numbers_that_no_run_writes(tmp_path: Path, drawn):
    rows = [
        '{"step": 1, "train/loss": 1' + "0" * 400 + "}",
        '{"step": 2, "train/loss": "nan"}',
        '{"step": 3}',
        "5",
        '{"step": "4"}',
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*rows, '{"step": 4, "train/loss": 2.5}', '{"step": 5, "tr']))
    plot_curves({"run": read_metrics(path)}, sft.PANELS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    (axis,) = (axis for axis in drawn[0].axes if axis.lines)
    assert axis.get_title() == "loss (nats per trained token)"
    assert [tuple(point) for point in axis.lines[0].get_xydata()] == [(4.0, 2.5)]


def test_a_run_without_numbers_has_an_empty_diagram(tmp_path: Path):
    plot_curves({"run": []}, dpo.PANELS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_share_their_diagrams(tmp_path: Path, drawn):
    runs = {name: [{"step": 1, "train/loss": loss}] for name, loss in (("a", 1.0), ("b", 2.0))}
    plot_curves(runs, sft.PANELS, tmp_path / "curves.png")
    (axis,) = (axis for axis in drawn[0].axes if axis.lines)
    assert axis.get_legend_handles_labels()[1] == ["a train/loss", "b train/loss"]


def test_panels_come_back_from_the_workdir(tmp_path: Path):
    assert read_panels(tmp_path) == DEFAULT
    for module in (sft, dpo, kto, reward_model, ppo, rloo):
        write_panels(tmp_path, module.PANELS)
        assert read_panels(tmp_path) == module.PANELS
    for damaged in ("[", "[1]", '[{"title": "a"}]', json.dumps({"title": "a"})):
        (tmp_path / "panels.json").write_text(damaged)
        assert read_panels(tmp_path) == DEFAULT
