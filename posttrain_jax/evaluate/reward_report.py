"""How good a reward model is, from the scores that it gave to preference pairs: numbers, tables and plots.

Everything is computed from arrays on the host. The margin of a pair is score(chosen) - score(rejected).

- Accuracy: the share of pairs with a margin above 0. A tie counts as wrong, as in RewardBench (arXiv:2403.13787) and
  in the accuracies of training, and ties are counted besides.
- Loss and calibration: a reward model trained on -log sigma(margin) says that the chosen answer is preferred with
  probability p = sigma(margin), with the margin on the scale of training: where scores were rescaled after it, the
  margin is divided by the gain (`ScoredPairs.gain`). Which of the two answers stands first is arbitrary, so every pair
  enters in both orders with half its weight: (p, chosen first, 1) and (1 - p, rejected first, 0). The curve is
  therefore symmetric about (1/2, 1/2) and no random order is needed. The bins are of equal width, an even number of
  them, so that no bin holds a pair in both orders. Expected calibration error (arXiv:1706.04599, eq. 3): sum over bins
  of the bin's share of the weight times |mean outcome - mean p|.
- Agreement with a person, where labels are soft: a label says that a person drawn at random prefers the chosen answer
  with probability p, so that person agrees with the model with probability p where the margin is above 0, 1 - p where
  it is below, 1/2 at a tie. Nobody who does not know the person can agree more often than max(p, 1 - p).
- Intervals are over groups (the prompts, which were drawn independently), not over pairs: Wilson's where every group is
  right or wrong, else 95 % percentile bootstraps (see `statistics.share`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.score_pairs import ScoredPairs
from posttrain_jax.evaluate.statistics import bootstrap_means, share

HISTOGRAM_BINS = 40
LENGTH_BINS = 8


@dataclasses.dataclass(frozen=True)
class _Counted:
    """Pairs as accuracies need them: float64 wins (1 or 0), weights, and the number of each pair's group."""

    wins_N: np.ndarray
    weights_N: np.ndarray
    groups_N: np.ndarray
    resamples: int
    seed: int

    def resampled(
        self, wins_N: np.ndarray, where_N: np.ndarray, offset: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weighted mean of `wins_N` over the pairs of `where_N`, of the data and then of every resample of the groups;
        and each group's own weighted mean."""
        _, group_N = np.unique(self.groups_N[where_N], return_inverse=True)
        weights_N = self.weights_N[where_N]
        columns_G2 = np.column_stack(
            [np.bincount(group_N, weights_N * wins_N[where_N]), np.bincount(group_N, weights_N)]
        )
        means = bootstrap_means(columns_G2, resamples=self.resamples, seed=self.seed + offset)
        return means[:, 0] / means[:, 1], columns_G2[:, 0] / columns_G2[:, 1]

    def share(self, wins_N: np.ndarray, where_N: np.ndarray) -> dict[str, float]:
        values, shares_G = self.resampled(wins_N, where_N)
        return dataclasses.asdict(share(values, shares_G))

    def accuracy(self, where_N: np.ndarray) -> dict[str, float]:
        return self.share(self.wins_N, where_N)


def reward_report(
    splits: Sequence[ScoredPairs],
    *,
    sections: Mapping[str, Sequence[str]] | None = None,
    section_counts: Mapping[str, float] | None = None,
    calibration_bins: int = 10,
    margin_bins: int = 4,
    resamples: int = 2000,
    seed: int = 0,
    about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The report as numbers that JSON can hold (None where a number is not defined); `reward_report_files` writes it.

    Args:
      splits: each with a name of its own.
      sections: section -> its subsets, for splits that hold all of them. Score of a section: sum over its subsets of
        accuracy * count / sum of counts; overall: the mean of the sections (RewardBench).
      section_counts: subset -> the count that it enters its section with, where that is not its number of pairs
        (RewardBench gives math-prm the weight of all code subsets).
      calibration_bins: how many, over [0, 1]; even.
      margin_bins: how many quantile bins of the label's margin and of the predicted one.
      resamples, seed: of the bootstrap; 0 resamples makes the intervals as narrow as the value.
      about: what was scored by what, in words, for the head of the report.

    Raises:
      InputError: no splits, two of one name, an odd number of bins, a section without subsets or with the weight 0, or
        sections of which no split holds all subsets.
    """
    names = [pairs.split for pairs in splits]
    if not names:
        raise InputError("There is nothing to report on: no split was given.")
    if len(set(names)) < len(names):
        raise InputError(f"Two splits have one name: {', '.join(names)}; name each once.")
    if calibration_bins < 2 or calibration_bins % 2:
        raise InputError(f"calibration_bins is {calibration_bins}; it must be even and 2 or more.")
    if margin_bins < 1:
        raise InputError(f"margin_bins is {margin_bins}; it must be 1 or more.")
    _check_sections(splits, sections or {}, section_counts or {})
    return {
        "about": dict(about or {}),
        "settings": {
            "calibration_bins": calibration_bins,
            "margin_bins": margin_bins,
            "resamples": resamples,
            "seed": seed,
        },
        "splits": {
            pairs.split: _split_report(
                pairs,
                sections or {},
                section_counts or {},
                calibration_bins=calibration_bins,
                margin_bins=margin_bins,
                resamples=resamples,
                seed=seed,
            )
            for pairs in splits
        },
    }


def _check_sections(
    splits: Sequence[ScoredPairs], sections: Mapping[str, Sequence[str]], section_counts: Mapping[str, float]
) -> None:
    for section, subsets in sections.items():
        if not subsets or not any(section_counts.get(subset, 1) for subset in subsets):
            raise InputError(
                f"The section {section!r} has no subset that counts; name at least one, or leave the section out."
            )
    needed = {subset for subsets in sections.values() for subset in subsets}
    split, lost = min(
        ((pairs.split, sorted(needed.difference(pairs.subsets_N or ()))) for pairs in splits),
        key=lambda pair: len(pair[1]),
    )
    if lost:
        raise InputError(
            f"No split has all the subsets of the sections: {split!r} comes nearest, with no pairs of the subset "
            f"{lost[0]!r}; correct the name, or leave the subset out."
        )


def _split_report(
    pairs: ScoredPairs,
    sections: Mapping[str, Sequence[str]],
    section_counts: Mapping[str, float],
    *,
    calibration_bins: int,
    margin_bins: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    chosen_N = np.asarray(pairs.chosen_scores_N, np.float64)
    rejected_N = np.asarray(pairs.rejected_scores_N, np.float64)
    margin_N = chosen_N - rejected_N
    trained_N = margin_N / pairs.gain
    count = len(margin_N)
    weights_N = np.ones(count) if pairs.weights_N is None else np.asarray(pairs.weights_N, np.float64)
    groups_N = np.arange(count) if pairs.groups_N is None else np.asarray(pairs.groups_N)
    counted = _Counted((margin_N > 0).astype(np.float64), weights_N, groups_N, resamples, seed)
    everywhere_N = np.ones(count, bool)
    report: dict[str, Any] = {
        "pairs": count,
        "groups": len(np.unique(groups_N)),
        "weight": float(weights_N.sum()),
        "ties": int(np.sum(margin_N == 0)),
        "accuracy": counted.accuracy(everywhere_N),
        "loss": float(np.average(np.logaddexp(0.0, -trained_N), weights=weights_N)),
        "mean_margin": float(np.average(margin_N, weights=weights_N)),
        "mean_chosen_score": float(np.average(chosen_N, weights=weights_N)),
        "mean_rejected_score": float(np.average(rejected_N, weights=weights_N)),
        "by_predicted_margin": _accuracy_by(np.abs(margin_N), margin_bins, counted),
        "calibration": calibration(trained_N, bins=calibration_bins, weights_N=weights_N),
        "length": _length_report(pairs, chosen_N, rejected_N),
        "histogram": _histogram(chosen_N, rejected_N),
    }
    if pairs.margins_N is not None:
        label_N = np.asarray(pairs.margins_N, np.float64)
        report["by_label_margin"] = _accuracy_by(label_N, margin_bins, counted)
    if pairs.probabilities_N is not None:
        report["person"] = _person_report(np.asarray(pairs.probabilities_N, np.float64), margin_N, counted)
    if pairs.raters:
        report["raters"] = {
            name: _rater_report(np.asarray(preference_N, np.float64), margin_N, counted)
            for name, preference_N in pairs.raters.items()
        }
    if pairs.subsets_N is not None:
        subsets_N = np.asarray(pairs.subsets_N)
        report["subsets"] = {
            str(name): {
                "pairs": int(np.sum(subsets_N == name)),
                "ties": int(np.sum((subsets_N == name) & (margin_N == 0))),
                "accuracy": counted.accuracy(subsets_N == name),
            }
            for name in np.unique(subsets_N)
        }
        if sections and {name for subsets in sections.values() for name in subsets} <= set(pairs.subsets_N):
            report["sections"] = _section_report(subsets_N, counted, sections, section_counts)
    if pairs.member_chosen_scores_EN is not None and pairs.member_rejected_scores_EN is not None:
        margins_EN = np.asarray(pairs.member_chosen_scores_EN, np.float64) - np.asarray(
            pairs.member_rejected_scores_EN, np.float64
        )
        spread_N = margins_EN.std(axis=0)
        report["disagreement"] = {
            "members": len(margins_EN),
            "mean_std": float(np.average(spread_N, weights=weights_N)),
            "member_accuracy": [float(np.average(row > 0, weights=weights_N)) for row in margins_EN],
            "by_tercile": _accuracy_by(spread_N, 3, counted),
        }
    return report


def _accuracy_by(values_N: np.ndarray, bins: int, counted: _Counted) -> list[dict[str, Any]]:
    """Accuracy in bins of `values_N`: one for each value where there are no more of them than bins, else quantiles."""
    distinct = np.unique(values_N)
    if len(distinct) <= bins:
        edges, index_N = None, np.searchsorted(distinct, values_N)
    else:
        edges = np.unique(np.quantile(values_N, np.linspace(0, 1, bins + 1)))
        index_N = np.clip(np.searchsorted(edges, values_N, side="right") - 1, 0, len(edges) - 2)
    accuracies = []
    for place in np.unique(index_N):
        where_N = index_N == place
        accuracies.append(
            {
                "low": float(distinct[place] if edges is None else edges[place]),
                "high": float(distinct[place] if edges is None else edges[place + 1]),
                "pairs": int(where_N.sum()),
                "accuracy": counted.accuracy(where_N),
            }
        )
    return accuracies


def calibration(margin_N: np.ndarray, *, bins: int, weights_N: np.ndarray) -> dict[str, Any]:
    """The calibration curve and the expected calibration error of sigma(margin), every pair in both orders.

    In the order in which the model prefers the first answer, a pair has p = sigma(|margin|) in [1/2, 1] and the outcome
    1 if the model is right, 0 if it is wrong, 1/2 for a tie; in the other order 1 - p and 1 - outcome, in the mirrored
    bin. So the upper half of the bins says it all, and the lower half is its mirror image.
    """
    p_N = 1 / (1 + np.exp(-np.abs(margin_N)))
    outcome_N = np.where(margin_N > 0, 1.0, np.where(margin_N < 0, 0.0, 0.5))
    half = bins // 2
    index_N = np.clip((p_N * bins).astype(int) - half, 0, half - 1)
    total = float(weights_N.sum())
    upper: list[dict[str, Any]] = []
    error = 0.0
    for place in range(half):
        here_N = index_N == place
        weight = float(weights_N[here_N].sum())
        entry = {
            "low": (half + place) / bins,
            "high": (half + place + 1) / bins,
            "pairs": int(here_N.sum()),
            "share": weight / total / 2,
            "predicted": None,
            "agreement": None,
        }
        if weight:
            predicted = float(np.average(p_N[here_N], weights=weights_N[here_N]))
            agreement = float(np.average(outcome_N[here_N], weights=weights_N[here_N]))
            entry |= {"predicted": predicted, "agreement": agreement}
            error += weight / total * abs(agreement - predicted)
        upper.append(entry)
    lower = [
        {
            **entry,
            "low": 1 - entry["high"],
            "high": 1 - entry["low"],
            "predicted": None if entry["predicted"] is None else 1 - entry["predicted"],
            "agreement": None if entry["agreement"] is None else 1 - entry["agreement"],
        }
        for entry in reversed(upper)
    ]
    return {"expected_calibration_error": error, "bins": lower + upper}


def _length_report(pairs: ScoredPairs, chosen_N: np.ndarray, rejected_N: np.ndarray) -> dict[str, Any]:
    """How score goes with length: over all 2N completions, and within pairs (margin and difference of lengths)."""
    lengths_N = np.asarray(pairs.chosen_lengths_N, np.float64)
    other_N = np.asarray(pairs.rejected_lengths_N, np.float64)
    scores_M, lengths_M = np.concatenate([chosen_N, rejected_N]), np.concatenate([lengths_N, other_N])
    margin_N, difference_N = chosen_N - rejected_N, lengths_N - other_N
    edges = np.unique(np.quantile(lengths_M, np.linspace(0, 1, LENGTH_BINS + 1)))
    index_M = np.clip(np.searchsorted(edges, lengths_M, side="right") - 1, 0, max(len(edges) - 2, 0))
    return {
        "unit": pairs.length_unit,
        "pearson": pearson(scores_M, lengths_M),
        "spearman": spearman(scores_M, lengths_M),
        "pearson_within_pairs": pearson(margin_N, difference_N),
        "spearman_within_pairs": spearman(margin_N, difference_N),
        "chosen_is_longer": float(np.mean(difference_N > 0)),
        "longer_scores_higher": float(np.mean(margin_N * difference_N > 0)),
        "by_length": [
            {
                "mean_length": float(lengths_M[index_M == place].mean()),
                "completions": int(np.sum(index_M == place)),
                "mean_score": float(scores_M[index_M == place].mean()),
                "std_score": float(scores_M[index_M == place].std()),
            }
            for place in np.unique(index_M)
        ],
    }


def pearson(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Pearson's correlation; None where one of the two is constant."""
    return float(stats.pearsonr(a_N, b_N).statistic) if np.ptp(a_N) and np.ptp(b_N) else None


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Spearman's correlation (equal values share their mean rank); None as for Pearson's."""
    return float(stats.spearmanr(a_N, b_N).statistic) if np.ptp(a_N) and np.ptp(b_N) else None


def _person_report(probability_N: np.ndarray, margin_N: np.ndarray, counted: _Counted) -> dict[str, Any]:
    """How often the model agrees with a person drawn at random, and how often the likelier answer does."""
    agrees_N = np.where(margin_N > 0, probability_N, np.where(margin_N < 0, 1 - probability_N, 0.5))
    return {
        "agreement": counted.share(agrees_N, np.ones(len(agrees_N), bool)),
        "most": float(np.average(np.maximum(probability_N, 1 - probability_N), weights=counted.weights_N)),
    }


def _rater_report(preference_N: np.ndarray, margin_N: np.ndarray, counted: _Counted) -> dict[str, Any]:
    """Over the pairs on which the rater has a preference: how often the model has the same."""
    has_N = np.isfinite(preference_N) & (preference_N != 0)
    same_N = (np.sign(preference_N) == np.sign(margin_N)).astype(np.float64)
    return {
        "pairs": int(has_N.sum()),
        "ties": int(np.sum(preference_N == 0)),
        "agreement": counted.share(same_N, has_N) if has_N.any() else None,
    }


def _section_report(
    subsets_N: np.ndarray,
    counted: _Counted,
    sections: Mapping[str, Sequence[str]],
    section_counts: Mapping[str, float],
) -> dict[str, Any]:
    """Sections and their mean; each subset is resampled for itself, since its count is fixed."""
    names = sorted({subset for subsets in sections.values() for subset in subsets})
    parts = {
        name: counted.resampled(counted.wins_N, subsets_N == name, offset=number)
        for number, name in enumerate(names)
    }
    counts = {name: section_counts.get(name, int(np.sum(subsets_N == name))) for name in names}
    scores = {
        section: np.average(
            [parts[name][0] for name in subsets], axis=0, weights=[counts[name] for name in subsets]
        )
        for section, subsets in sections.items()
    }
    shares = {
        section: np.concatenate([parts[name][1] for name in subsets]) for section, subsets in sections.items()
    }
    scores["overall"] = np.mean(list(scores.values()), axis=0)
    shares["overall"] = np.concatenate([shares_G for _, shares_G in parts.values()])
    return {name: dataclasses.asdict(share(score, shares[name])) for name, score in scores.items()}


def _histogram(chosen_N: np.ndarray, rejected_N: np.ndarray) -> dict[str, list]:
    edges = np.histogram_bin_edges(np.concatenate([chosen_N, rejected_N]), bins=HISTOGRAM_BINS)
    return {
        "edges": edges.tolist(),
        "chosen": np.histogram(chosen_N, edges)[0].tolist(),
        "rejected": np.histogram(rejected_N, edges)[0].tolist(),
    }
