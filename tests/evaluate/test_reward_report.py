"""The reward report: every number by hand or against SciPy, and what is written."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.reward_report import (
    calibration,
    pearson,
    reward_report,
    spearman,
)
from posttrain_jax.evaluate.reward_report_files import report_text, write_report
from posttrain_jax.evaluate.score_pairs import ScoredPairs


def pairs_of(margins, *, split="held_out", rejected=None, **fields) -> ScoredPairs:
    """Pairs with these margins; the chosen one has 4 tokens and the rejected one 3, unless said otherwise."""
    margins = np.asarray(margins, np.float64)
    rejected = np.zeros(len(margins)) if rejected is None else np.asarray(rejected, np.float64)
    lengths = {"chosen_lengths_N": np.full(len(margins), 4), "rejected_lengths_N": np.full(len(margins), 3)}
    return ScoredPairs(
        split=split, chosen_scores_N=rejected + margins, rejected_scores_N=rejected, **{**lengths, **fields}
    )


def part_of(pairs: ScoredPairs, **settings) -> dict:
    return reward_report([pairs], **{"resamples": 50, **settings})["splits"][pairs.split]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_accuracy_with_ties():
    """Margins 2, 1, 0, 0, -1: two of five are right, two are ties."""
    part = part_of(pairs_of([2, 1, 0, 0, -1]))
    assert (part["pairs"], part["ties"]) == (5, 2)
    assert part["accuracy"]["value"] == 0.4
    assert 0 <= part["accuracy"]["low"] <= 0.4 <= part["accuracy"]["high"] <= 1
    assert part["mean_margin"] == pytest.approx(0.4)


def test_loss_and_weights():
    """sigma(m) = 3/4 and 1/4, weights 3 and 1: accuracy 3/4; loss (3 log(4/3) + log 4) / 4."""
    part = part_of(pairs_of([logit(0.75), logit(0.25)], weights_N=np.asarray([3.0, 1.0])), resamples=0)
    assert part["accuracy"] == {"value": 0.75, "low": 0.75, "high": 0.75}
    assert part["loss"] == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)
    assert part["weight"] == 4


def test_groups_are_resampled_as_a_whole():
    """Ten right pairs of one prompt and ten wrong ones of another are 1 right of 2: Wilson's interval is
    0.5 +- 1.96 sqrt(0.25 / 2 + 1.96^2 / 16) / (1 + 1.96^2 / 2) = 0.5 +- 0.405; by pairs it would be narrow."""
    margins = np.repeat([1.0, -1.0], 10)
    by_prompt = part_of(pairs_of(margins, groups_N=np.repeat(["a", "b"], 10)), resamples=400)
    assert by_prompt["groups"] == 2
    assert by_prompt["accuracy"]["value"] == 0.5
    assert by_prompt["accuracy"]["low"] == pytest.approx(0.0945, abs=1e-4)
    assert by_prompt["accuracy"]["high"] == pytest.approx(0.9055, abs=1e-4)
    alone = part_of(pairs_of(margins), resamples=400)["accuracy"]
    assert 0.2 < alone["low"] < 0.4 and 0.6 < alone["high"] < 0.8


def test_calibration_error_of_four_pairs():
    """Confidences .92 (right) and .96 (right): mean .94, all right, gap .06. .72 (right) and .76 (wrong): mean .74,
    half right, gap .24. Each bin has half of the pairs: .5 * .06 + .5 * .24 = .15."""
    margins = np.asarray([logit(0.92), logit(0.96), logit(0.72), -logit(0.76)])
    found = calibration(margins, bins=10, weights_N=np.ones(4))
    assert found["expected_calibration_error"] == pytest.approx(0.15)
    assert [b["pairs"] for b in found["bins"]] == [2, 0, 2, 0, 0, 0, 0, 2, 0, 2]
    top, seventies = found["bins"][9], found["bins"][7]
    assert (top["predicted"], top["agreement"]) == (pytest.approx(0.94), 1.0)
    assert (seventies["predicted"], seventies["agreement"]) == (pytest.approx(0.74), 0.5)
    assert found["bins"][5] == {
        "low": 0.5,
        "high": 0.6,
        "pairs": 0,
        "share": 0.0,
        "predicted": None,
        "agreement": None,
    }
    assert sum(b["share"] for b in found["bins"]) == pytest.approx(1)


def test_the_curve_is_symmetric_and_the_error_does_not_depend_on_the_order():
    """The error over all bins is the one over the upper half: both halves have the same gaps and weights. A pair whose
    model is wrong with confidence c is the pair (1 - c, chosen first)."""
    margins = np.random.default_rng(0).normal(0.3, 1.5, 400)
    found = calibration(margins, bins=8, weights_N=np.ones(400))
    bins = found["bins"]
    for bin_, mirrored in zip(bins, reversed(bins), strict=True):
        assert bin_["predicted"] + mirrored["predicted"] == pytest.approx(1)
        assert bin_["agreement"] + mirrored["agreement"] == pytest.approx(1)
        assert bin_["low"] < bin_["predicted"] < bin_["high"]
    whole = sum(b["share"] * abs(b["agreement"] - b["predicted"]) for b in bins)
    assert found["expected_calibration_error"] == pytest.approx(whole)


def test_calibration_limits():
    """Ties say 1/2 and are half right: no error. Certain and always right: none. Certain and always wrong: 1."""
    ones = np.ones(3)
    for margin, error in ((0.0, 0.0), (1000.0, 0.0), (-1000.0, 1.0)):
        found = calibration(np.full(3, margin), bins=10, weights_N=ones)
        assert found["expected_calibration_error"] == pytest.approx(error)


def test_a_model_that_says_what_is_true_is_calibrated():
    """Outcomes drawn from the model's own probabilities: the error is that of sampling alone."""
    random = np.random.default_rng(1)
    strength = np.abs(random.normal(0, 2, 40_000))
    right = random.random(40_000) < 1 / (1 + np.exp(-strength))
    found = calibration(np.where(right, strength, -strength), bins=10, weights_N=np.ones(40_000))
    assert found["expected_calibration_error"] < 0.01


def test_correlations_are_scipys():
    random = np.random.default_rng(2)
    a, b = random.integers(0, 9, 60).astype(float), random.normal(size=60)
    b += 0.2 * a
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert pearson(a, np.ones(60)) is None and spearman(np.ones(60), b) is None


def test_length():
    """Scores (3, 1 | 0, 1), lengths (30, 10 | 20, 10): completions (3, 30), (1, 10), (0, 20), (1, 10).
    Within pairs: margins 3, 0 and differences of lengths 10, 0, so Pearson's is 1; the longer one wins once of two."""
    pairs = pairs_of(
        [3.0, 0.0],
        rejected=[0.0, 1.0],
        chosen_lengths_N=np.asarray([30, 10]),
        rejected_lengths_N=np.asarray([20, 10]),
        length_unit="characters",
    )
    length = part_of(pairs)["length"]
    scores, lengths = [3.0, 1.0, 0.0, 1.0], [30, 10, 20, 10]
    assert length["unit"] == "characters"
    assert length["pearson"] == pytest.approx(stats.pearsonr(scores, lengths).statistic)
    assert length["spearman"] == pytest.approx(stats.spearmanr(scores, lengths).statistic)
    assert length["pearson_within_pairs"] == pytest.approx(1)
    assert (length["chosen_is_longer"], length["longer_scores_higher"]) == (0.5, 0.5)
    assert sum(b["completions"] for b in length["by_length"]) == 4
    shortest = length["by_length"][0]
    assert (shortest["mean_length"], shortest["mean_score"], shortest["completions"]) == (10, 1, 2)
    assert part_of(pairs_of([1.0, 2.0]))["length"]["pearson_within_pairs"] is None


def test_accuracy_by_margin():
    """Label margins 1, 1, 2, 3: a bin each. Predicted |margin| 1, 2, ..., 8 in quartiles: two pairs each."""
    pairs = pairs_of([1.0, -1.0, 5.0, 6.0], margins_N=np.asarray([1, 1, 2, 3]))
    bins = part_of(pairs)["by_label_margin"]
    assert [(b["low"], b["high"], b["pairs"], b["accuracy"]["value"]) for b in bins] == [
        (1, 1, 2, 0.5),
        (2, 2, 1, 1.0),
        (3, 3, 1, 1.0),
    ]
    bins = part_of(pairs_of([1, -2, 3, -4, 5, 6, -7, -8]))["by_predicted_margin"]
    assert [(b["pairs"], b["accuracy"]["value"]) for b in bins] == [(2, 0.5), (2, 0.5), (2, 1.0), (2, 0.0)]
    assert (bins[0]["low"], bins[-1]["high"]) == (1, 8)
    assert "by_label_margin" not in part_of(pairs_of([1.0]))


def test_raters():
    """Margins 1, 1, -1, 0. Rater a: 1, -1, -1, 1: agrees, not, agrees, not (a tie of the model) = 1/2 of 4.
    Rater b: not asked, 0, -1, not asked: 1 of 1. Rater c has no preference at all."""
    nan = math.nan
    raters = {
        "a": np.asarray([1, -1, -1, 1]),
        "b": np.asarray([nan, 0, -1, nan]),
        "c": np.asarray([nan, 0, nan, nan]),
    }
    found = part_of(pairs_of([1, 1, -1, 0], raters=raters))["raters"]
    assert (found["a"]["pairs"], found["a"]["ties"], found["a"]["agreement"]["value"]) == (4, 0, 0.5)
    assert (found["b"]["pairs"], found["b"]["ties"], found["b"]["agreement"]["value"]) == (1, 1, 1.0)
    assert found["c"] == {"pairs": 0, "ties": 1, "agreement": None}


def test_agreement_with_a_person():
    """p = 0.9, 0.6, 0.7, 0.2 and margins 1, -1, 0, -1: 0.9, 1 - 0.6, 1/2, 1 - 0.2; at most 0.9, 0.6, 0.7, 0.8."""
    pairs = pairs_of([1, -1, 0, -1], probabilities_N=np.asarray([0.9, 0.6, 0.7, 0.2]))
    person = part_of(pairs)["person"]
    assert person["agreement"]["value"] == pytest.approx((0.9 + 0.4 + 0.5 + 0.8) / 4)
    assert person["most"] == pytest.approx((0.9 + 0.6 + 0.7 + 0.8) / 4)
    assert "prefers what the model prefers in 65.0% (" in report_text(reward_report([pairs], resamples=50))
    assert "person" not in part_of(pairs_of([1.0]))


def test_sections():
    """math 1/2 of 2 pairs, code 1 of 1 (a tie beside it: 1/2 of 2), chat 3/4 of 4. Reasoning = (2 * .5 + 2 * .5) / 4
    = .5; with the count 6 for math and code all right it would lean on math. Overall = (.5 + .75) / 2."""
    subsets = ["math", "math", "code", "code", "chat", "chat", "chat", "chat"]
    pairs = pairs_of([1, -1, 1, 0, 1, 1, 1, -1], subsets_N=subsets)
    sections = {"Reasoning": ("math", "code"), "Chat": ("chat",)}
    part = part_of(pairs, sections=sections)
    assert {name: found["accuracy"]["value"] for name, found in part["subsets"].items()} == {
        "chat": 0.75,
        "code": 0.5,
        "math": 0.5,
    }
    assert part["subsets"]["code"]["ties"] == 1
    found = {name: score["value"] for name, score in part["sections"].items()}
    assert found == {"Reasoning": 0.5, "Chat": 0.75, "overall": 0.625}
    # chat counts 4 and math 2: (4 * 3/4 + 2 * 1/2) / 6 = 2/3; with the count 12 for math: (3 + 6) / 16
    joined = {"All": ("chat", "math")}
    assert part_of(pairs, sections=joined)["sections"]["All"]["value"] == pytest.approx(2 / 3)
    heavy = part_of(pairs, sections=joined, section_counts={"math": 12})["sections"]["All"]
    assert heavy["value"] == pytest.approx(9 / 16)
    assert heavy["low"] <= heavy["value"] <= heavy["high"]


def test_sections_are_of_the_splits_that_hold_them():
    """A further split without subsets, or with others, has none."""
    sections = {"All": ("easy", "hard")}
    splits = [
        pairs_of([1, -1], split="bench", subsets_N=["easy", "hard"]),
        pairs_of([1.0, 1.0], split="others", subsets_N=["easy", "odd"]),
        pairs_of([1.0], split="plain"),
    ]
    parts = reward_report(splits, sections=sections, resamples=10)["splits"]
    assert parts["bench"]["sections"]["All"]["value"] == 0.5
    assert "sections" not in parts["others"] and "sections" not in parts["plain"]
    with pytest.raises(InputError, match="'others' comes nearest, with no pairs of the subset 'hard'"):
        reward_report(splits[1:], sections=sections, resamples=10)


def test_loss_and_calibration_are_of_the_scale_of_training():
    """Scores that were multiplied by 3 and moved by 5 afterwards: the loss stays, the margins do not."""
    margins = np.asarray([logit(0.75), logit(0.25), 2.0])
    before = part_of(pairs_of(margins))
    after = part_of(pairs_of(3 * margins, rejected=np.full(3, 5.0), gain=3.0))
    for name in ("loss", "accuracy"):
        assert after[name] == pytest.approx(before[name])
    errors = [part["calibration"]["expected_calibration_error"] for part in (before, after)]
    assert errors[0] == pytest.approx(errors[1])
    assert after["mean_margin"] == pytest.approx(3 * before["mean_margin"])


def test_disagreement():
    """Two members; their margins of row n are 1 +- n, so the standard deviation is n: terciles of two rows each. The
    scores are right in the two rows on which the members agree most."""
    spread = np.arange(6.0)
    pairs = pairs_of(
        [1, 1, -1, 1, -1, -1],
        member_chosen_scores_EN=np.stack([1 + spread, 1 - spread]),
        member_rejected_scores_EN=np.zeros((2, 6)),
    )
    found = part_of(pairs)["disagreement"]
    assert (found["members"], found["mean_std"]) == (2, 2.5)
    assert found["member_accuracy"] == [1.0, pytest.approx(1 / 6)]
    assert [(b["pairs"], b["accuracy"]["value"]) for b in found["by_tercile"]] == [
        (2, 1.0),
        (2, 0.5),
        (2, 0.0),
    ]


def test_histogram_counts_every_completion():
    part = part_of(pairs_of(np.linspace(-2, 3, 50), rejected=np.linspace(0, 1, 50)))
    histogram = part["histogram"]
    assert len(histogram["edges"]) == len(histogram["chosen"]) + 1
    assert sum(histogram["chosen"]) == sum(histogram["rejected"]) == 50


def rich_pairs(split: str, count: int, seed: int) -> ScoredPairs:
    random = np.random.default_rng(seed)
    members = random.normal(0.4, 1, (2, 3, count))
    return ScoredPairs(
        split=split,
        chosen_scores_N=members[0].mean(axis=0) + 0.5,
        rejected_scores_N=members[1].mean(axis=0),
        chosen_lengths_N=random.integers(1, 90, count),
        rejected_lengths_N=random.integers(1, 90, count),
        margins_N=random.random(count),
        groups_N=random.integers(0, count // 2, count),
        subsets_N=[("easy", "hard")[n % 2] for n in range(count)],
        raters={"rater_1": random.choice([-1.0, 0.0, 1.0, math.nan], count)},
        member_chosen_scores_EN=members[0],
        member_rejected_scores_EN=members[1],
    )


def test_what_is_written(tmp_path):
    splits = [rich_pairs("in_distribution", 60, 0), rich_pairs("out_of_distribution", 40, 1)]
    report = reward_report(splits, sections={"All": ("easy", "hard")}, resamples=50)
    for _ in range(2):  # the second time into a folder with files of the same names
        write_report(report, tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.json", "report.md", "calibration.png", "scores.png", "margins.png", "length.png"}
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    for path in (tmp_path / "report").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    text = (tmp_path / "report" / "report.md").read_text()
    assert text == report_text(report)
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert shown == ["calibration.png", "scores.png", "margins.png", "length.png"]
    assert "## out_of_distribution" in text and "| rater_1 |" in text and "| overall |" in text
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert all(line.endswith("|") for line in rows) and len(rows) > 30
    assert (tmp_path / "report" / "report.json").stat().st_size < 40_000


def test_the_smallest_report(tmp_path):
    """One pair, a tie, with scores and lengths that are all equal: nothing divides by zero."""
    report = reward_report([pairs_of([0.0], chosen_lengths_N=np.asarray([3]))], resamples=0)
    write_report(report, tmp_path)
    assert report["splits"]["held_out"]["accuracy"]["value"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_scores_N": np.zeros(0)}, "holds no pairs"),
        ({"rejected_scores_N": np.zeros(3)}, "has 2 pairs, but rejected_scores_N holds 3"),
        ({"raters": {"ann": np.zeros(1)}}, "the preferences of ann holds 1"),
        ({"chosen_scores_N": np.asarray([1.0, math.inf])}, "1 of chosen_scores_N are not finite"),
        ({"weights_N": np.asarray([1.0, 0.0])}, "every weight must be above 0"),
        ({"length_unit": "words"}, "use tokens or characters"),
        ({"gain": 0.0}, "the scores' gain is 0.0; it must be above 0"),
        ({"member_chosen_scores_EN": np.zeros((3, 2))}, "give both member scores or none"),
        (
            {"member_chosen_scores_EN": np.zeros((2, 3)), "member_rejected_scores_EN": np.zeros((3, 2))},
            r"shape \(2, 3\), not \(E, 2\)",
        ),
    ],
)
def test_pairs_that_do_not_belong_together(change, message):
    good = pairs_of([1.0, 2.0])
    with pytest.raises(InputError, match=message):
        dataclasses.replace(good, **change)


def test_settings_that_make_no_sense():
    pairs = pairs_of([1.0, 2.0], subsets_N=["a", "a"])
    for settings, message in (
        ({"calibration_bins": 5}, "must be even"),
        ({"margin_bins": 0}, "must be 1 or more"),
        ({"sections": {"S": ("a", "b")}}, "no pairs of the subset 'b'"),
        ({"sections": {"S": ()}}, "The section 'S' has no subset that counts"),
        (
            {"sections": {"S": ("a",)}, "section_counts": {"a": 0}},
            "The section 'S' has no subset that counts",
        ),
    ):
        with pytest.raises(InputError, match=message):
            reward_report([pairs], **settings)
    with pytest.raises(InputError, match="no split was given"):
        reward_report([])
    with pytest.raises(InputError, match="Two splits have one name"):
        reward_report([pairs, pairs])


def test_names_out_of_the_data_are_no_markup(tmp_path):
    """Neither in the tables of Markdown, nor for the plots, which read $...$ as mathematics."""
    pairs = pairs_of([1, -1], split="$\\frac", subsets_N=["<img src=x>|\n# a", "b\ud83d"])
    report = reward_report([pairs], resamples=50, about={"model": "<b>"})
    text = report_text(report)
    assert "| &lt;img src=x&gt;\\| # a |" in text and "- model: &lt;b&gt;" in text
    write_report(report, tmp_path)
    assert (tmp_path / "report.md").stat().st_size and (tmp_path / "margins.png").stat().st_size
