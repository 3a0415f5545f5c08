"""How sure a number is: bootstrap intervals over rows, and paired comparisons of two models on the same rows.

A row is what was drawn independently (a prompt, a sequence), never a token or an instruction: those of one row go
together. A metric of a row is a sum and a count, and the metric is the sum of sums over the sum of counts.

The interval of a share of rows that are right or wrong is Wilson's (1927, JASA 22): a bootstrap of 54 right of 54 says
"100 to 100 %", Wilson says 93.4 to 100 %. Shares that a bootstrap is needed for (rows that are partly right, weights)
get Wilson's where no resample differs from the data.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from posttrain_jax.core.errors import InputError

BLOCK = 1 << 24
ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95 % confidence interval (percentile bootstrap over rows; of a share of rows, Wilson's)."""

    value: float
    low: float
    high: float


def bootstrap_means(columns_NC: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Column means of the data and of `resamples` draws of N rows with replacement: float64 `[1 + resamples, C]`.

    All columns of a draw come from the same rows, so what is computed from several of them (a ratio, a difference)
    is resampled as a whole. Efron 1979, Annals of Statistics 7(1).
    """
    draws = bootstrap_counts(len(columns_NC), resamples=resamples, seed=seed)
    drawn = [drawn_RN @ columns_NC / len(columns_NC) for drawn_RN in draws]
    return np.concatenate([columns_NC.mean(axis=0, keepdims=True), *drawn])


def bootstrap_counts(rows: int, *, resamples: int, seed: int, block: int = BLOCK) -> Iterator[np.ndarray]:
    """How often each row is in each of `resamples` draws with replacement, int64 `[R, rows]`, in parts.

    A part has at most `block` numbers, which changes its size alone, not what is drawn.
    """
    random = np.random.default_rng(seed)
    at_once = max(1, block // rows)
    for first in range(0, resamples, at_once):
        yield random.multinomial(rows, np.full(rows, 1 / rows), size=min(at_once, resamples - first))


def interval(values: np.ndarray) -> Estimate:
    """The first value is of the data itself, the others of resamples: value, 2.5 and 97.5 percentile."""
    drawn = values[1:] if len(values) > 1 else values
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high))


def wilson(right: int, rows: int) -> Estimate:
    """The share of `rows` that is right, with Wilson's interval."""
    limits = stats.binomtest(right, rows).proportion_ci(method="wilson")
    return Estimate(right / rows, float(limits.low), float(limits.high))


def share(values: np.ndarray, shares_N: np.ndarray) -> Estimate:
    """A share with its interval: Wilson's where every row is right (1) or wrong (0), or where all resamples agree.

    Args:
      values: as of `interval`: of the data and of the resamples.
      shares_N: each row's own share, 0 to 1.
    """
    rows = len(shares_N)
    is_right_or_wrong = bool(np.isin(shares_N, (0.0, 1.0)).all())
    if is_right_or_wrong and abs(values[0] - shares_N.mean()) < ROUNDING:
        return wilson(int(shares_N.sum()), rows)
    if np.ptp(values) < ROUNDING and (values[0] < ROUNDING or values[0] > 1 - ROUNDING):
        return wilson(round(float(values[0])) * rows, rows)
    return interval(values)


def ratio_estimates(
    rows: Sequence[Mapping[str, tuple[float, float]]], *, resamples: int, seed: int, shares: bool = False
) -> dict[str, Estimate]:
    """Each metric's sum of sums / sum of counts over the rows, with its interval.

    Args:
      rows: (sum, count) of every metric, for each row; every row has the same metrics, with positive counts.
      resamples: of the bootstrap; 0 makes the intervals as narrow as the value.
      seed: of the resamples.
      shares: whether every metric is a share of its counts, see `share`.

    Raises:
      InputError: there are no rows.
    """
    if not rows:
        raise InputError("There is nothing to evaluate: no row is left.")
    names = list(rows[0])
    columns_NC = np.asarray([[number for name in names for number in row[name]] for row in rows], np.float64)
    means = bootstrap_means(columns_NC, resamples=resamples, seed=seed)
    estimates = {}
    for place, name in enumerate(names):
        values = means[:, 2 * place] / means[:, 2 * place + 1]
        own_N = columns_NC[:, 2 * place] / columns_NC[:, 2 * place + 1]
        estimates[name] = share(values, own_N) if shares else interval(values)
    return estimates


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` when both are equally likely; rows that tie are left out.

    For right-or-wrong scores of two models on the same rows this is the exact McNemar test on the discordant rows
    (McNemar 1947, Psychometrika 12(2)).
    """
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def permutation_test(differences_N: np.ndarray, *, resamples: int, seed: int) -> float:
    """Two-sided p-value of the sum of paired differences when each one's sign is a coin toss.

    All 2^n signs of the n differences that are not 0 where those are no more than `resamples` (Fisher's exact paired
    test); else `resamples` random ones, and p = (1 + as extreme) / (1 + resamples). `scipy.stats.permutation_test` says
    the same and takes ten times as long (4.6 s instead of 0.4 s for 5,000 rows and 10,000 resamples).
    """
    nonzero = np.asarray(differences_N, np.float64)
    nonzero = nonzero[nonzero != 0]
    observed = abs(nonzero.sum()) - ROUNDING * np.abs(nonzero).sum()
    if 2 ** min(nonzero.size, 62) <= resamples:
        signs = np.asarray(list(itertools.product((-1.0, 1.0), repeat=nonzero.size)))
        return float(np.mean(np.abs(signs @ nonzero) >= observed))
    extreme = sum(int((np.abs(sums) >= observed).sum()) for sums in _flipped_sums(nonzero, resamples, seed))
    return (1 + extreme) / (1 + resamples)


def _flipped_sums(nonzero: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // nonzero.size)
    for first in range(0, resamples, block):
        size = (min(block, resamples - first), nonzero.size)
        yield 2.0 * (random.integers(0, 2, size, dtype=np.int8) @ nonzero) - nonzero.sum()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on the same rows; differences are b - a.

    Attributes:
      a, b: each model's metric with its interval.
      difference: b - a, with the interval of the paired bootstrap (both models on the same resampled rows).
      rows: how many rows there are.
      better, worse: on how many of them b's sum is above, below a's.
      sign_p: exact sign test of better against worse; McNemar's exact test where a row is right or wrong.
      permutation_p: paired permutation test of the difference.
    """

    a: Estimate
    b: Estimate
    difference: Estimate
    rows: int
    better: int
    worse: int
    sign_p: float
    permutation_p: float


def _own(values: np.ndarray, rows_N2: np.ndarray) -> Estimate:
    """Of one model: a share where every row counts one thing that is right or wrong."""
    if np.isin(rows_N2[:, 0], (0.0, 1.0)).all() and (rows_N2[:, 1] == 1.0).all():
        return wilson(int(rows_N2[:, 0].sum()), len(rows_N2))
    return interval(values)


def compare(a_N2: np.ndarray, b_N2: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compares one metric of two models, row by row.

    Args:
      a_N2, b_N2: (sum, count) of the metric for each row, the same rows in the same order, with equal counts.
      resamples: of the bootstrap and of the permutation test.
      seed: of both.

    Raises:
      InputError: no rows, or rows that do not belong together.
    """
    a_N2, b_N2 = np.asarray(a_N2, np.float64), np.asarray(b_N2, np.float64)
    if len(a_N2) == 0:
        raise InputError("There is nothing to compare: the results hold no rows.")
    if a_N2.shape != b_N2.shape or not np.array_equal(a_N2[:, 1], b_N2[:, 1]):
        raise InputError("The two results cannot be paired: their rows do not count the same things.")
    columns_N3 = np.column_stack([a_N2[:, 0], b_N2[:, 0], a_N2[:, 1]])
    sum_a, sum_b, count = bootstrap_means(columns_N3, resamples=resamples, seed=seed).T
    differences_N = b_N2[:, 0] - a_N2[:, 0]
    better, worse = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    return Comparison(
        a=_own(sum_a / count, a_N2),
        b=_own(sum_b / count, b_N2),
        difference=interval((sum_b - sum_a) / count),
        rows=len(a_N2),
        better=better,
        worse=worse,
        sign_p=sign_test(better, worse),
        permutation_p=permutation_test(differences_N, resamples=resamples, seed=seed),
    )
