"""Win rates from pairwise judgments: with intervals, paired tests, position bias, and controlled for length.

A judgment is of one pair of completions of one prompt, by models A and B, in both orders; all numbers here are of B
over A. Prompts are what was drawn independently: several completions of one prompt are averaged before anything is
counted.

Judges like long completions. The length-controlled win rate is what a logistic model of the judgments says of two
completions of equal length: AlpacaEval 2 (arXiv:2404.04475, section 3), in the form without the difficulty of each
instruction,

    logit P(B preferred) = w_len * tanh(d / std(d)) + w_base,    d = characters of B - characters of A,

fitted to preferences in [0, 1] (a tie is 0.5); its win rate is sigma(w_base). Where it departs from alpaca_eval: d has
the other sign, which changes the sign of w_len alone; the published difficulties and the rows of two verbose and
concise baselines, which belong to its own 805 prompts and its own baseline, are left out; and instead of a
cross-validated L1 penalty on both weights there is a small ridge on w_len alone. So w_base is not shrunk, the result
equals the plain win rate where length plays no part, and there is always one solution. Where the longer completion (or
the shorter one) is preferred in every single pair, w_base would say only how many of each there are; the win rate is
then 0.5, with an interval from 0 to 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.statistics import (
    Estimate,
    bootstrap_counts,
    bootstrap_means,
    interval,
    permutation_test,
    share,
    sign_test,
)
from posttrain_jax.rewards.judge import Judgment

RIDGE = 1e-3
STEPS = 200
PRECISION = 1e-9
LENGTH_RESAMPLES = 1000  # each one is a regression
BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class LengthControlled:
    """The win rate of B over A as it would be with completions of equal length.

    Attributes:
      win_rate: sigma(w_base), with its interval (bootstrap over prompts, std(d) as in the whole data); None where the
        model says nothing, and then `note` says why.
      length_weight: w_len; positive where longer completions are preferred. None where length plays no part.
      base_weight: w_base; None where it is infinite or says nothing.
      note: "" or what is special about these data, in a sentence.
    """

    win_rate: Estimate | None
    length_weight: float | None
    base_weight: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class WinRate:
    """What the judgments say of B against A.

    Attributes:
      win_rate: mean preference for B, ties as half, with its interval.
      length_controlled: the same for completions of equal length.
      prompts, pairs: how many there were.
      wins, losses, ties: prompts whose mean preference for B is above, below and at 0.5.
      sign_p: exact sign test of wins against losses.
      permutation_p: paired permutation test of the mean preference being 0.5.
      first_preferred: mean preference for the completion shown first; 0.5 = the order plays no part.
      flipped: share of pairs whose verdict goes from one model to the other when the completions change places.
      unparsed: verdicts, of 2 * pairs, that could not be read and count as ties.
      mean_length_a, mean_length_b: characters of a completion.
    """

    win_rate: Estimate
    length_controlled: LengthControlled
    prompts: int
    pairs: int
    wins: int
    losses: int
    ties: int
    sign_p: float
    permutation_p: float
    first_preferred: Estimate
    flipped: Estimate
    unparsed: int
    mean_length_a: float
    mean_length_b: float


def win_rate(judgments: Sequence[Judgment], *, resamples: int = 10_000, seed: int = 0) -> WinRate:
    """The win rate of B over A and what belongs to it.

    Every prompt weighs the same, however many of its completions were judged.

    Args:
      judgments: one for each pair.
      resamples: of the bootstrap over prompts, and of the permutation test.
      seed: of both.

    Raises:
      InputError: there are no judgments, a preference lies outside [0, 1], or a pair is there twice.
    """
    if not judgments:
        raise InputError("There is nothing to compare: there are no judgments.")
    _check(judgments)
    by_prompt: dict[str | int, list[Judgment]] = {}
    for judgment in judgments:
        by_prompt.setdefault(judgment.prompt, []).append(judgment)
    rows_N3 = np.asarray(
        [
            [
                np.mean([one.preference for one in group]),
                np.mean([(1 - one.a_first + one.b_first) / 2 for one in group]),
                np.mean([_flips(one) for one in group]),
            ]
            for group in by_prompt.values()
        ],
        np.float64,
    )
    means = bootstrap_means(rows_N3, resamples=resamples, seed=seed)
    above_N = rows_N3[:, 0] - 0.5
    wins, losses = int((above_N > PRECISION).sum()), int((above_N < -PRECISION).sum())
    return WinRate(
        win_rate=share(means[:, 0], rows_N3[:, 0]),
        length_controlled=length_controlled(judgments, resamples=min(resamples, LENGTH_RESAMPLES), seed=seed),
        prompts=len(by_prompt),
        pairs=len(judgments),
        wins=wins,
        losses=losses,
        ties=len(by_prompt) - wins - losses,
        sign_p=sign_test(wins, losses),
        permutation_p=permutation_test(above_N, resamples=resamples, seed=seed),
        first_preferred=share(means[:, 1], rows_N3[:, 1]),
        flipped=share(means[:, 2], rows_N3[:, 2]),
        unparsed=sum(judgment.unparsed for judgment in judgments),
        mean_length_a=float(np.mean([judgment.length_a for judgment in judgments])),
        mean_length_b=float(np.mean([judgment.length_b for judgment in judgments])),
    )


def _check(judgments: Sequence[Judgment]) -> None:
    seen: set[tuple[str | int, int]] = set()
    for judgment in judgments:
        for value in (judgment.a_first, judgment.b_first):
            if not 0.0 <= value <= 1.0:
                raise InputError(
                    f"The judgment of prompt {judgment.prompt!r} holds a preference of {value:g}; it must lie between "
                    "0 (A) and 1 (B)."
                )
        key = (judgment.prompt, judgment.sample)
        if key in seen:
            raise InputError(f"Prompt {key[0]!r}, sample {key[1]} is judged twice; give each pair once.")
        seen.add(key)


def _flips(judgment: Judgment) -> bool:
    return (judgment.a_first - 0.5) * (judgment.b_first - 0.5) < 0


def length_controlled(
    judgments: Sequence[Judgment], *, resamples: int = 1000, seed: int = 0, ridge: float = RIDGE
) -> LengthControlled:
    """The length-controlled win rate; see the top of this file.

    Args:
      judgments: one for each pair; pairs of one prompt share its weight.
      resamples, seed: of the bootstrap over prompts.
      ridge: ridge / 2 * w_len^2 is subtracted from the log-likelihood of all prompts.

    Raises:
      InputError: there are no judgments.
    """
    if not judgments:
        raise InputError("There is nothing to compare: there are no judgments.")
    numbers = {prompt: row for row, prompt in enumerate(dict.fromkeys(one.prompt for one in judgments))}
    prompt_S = np.asarray([numbers[one.prompt] for one in judgments])
    preference_S = np.asarray([one.preference for one in judgments], np.float64)
    longer_S = np.asarray([one.length_b - one.length_a for one in judgments], np.float64)
    draws = list(_weights(prompt_S, resamples=resamples, seed=seed))
    raw_R = np.concatenate([_preference(preference_S, draw_RS) for draw_RS in draws])
    if np.ptp(preference_S) == 0 and preference_S[0] in (0.0, 1.0):
        better = "B" if preference_S[0] else "A"
        return LengthControlled(
            share(raw_R, np.full(len(numbers), preference_S[0])),
            None,
            None,
            f"{better} is preferred everywhere, so length can explain nothing.",
        )
    if not longer_S.any():
        weight = math.log(raw_R[0] / (1 - raw_R[0]))
        return LengthControlled(
            interval(raw_R),
            None,
            weight,
            "All completions are as long as their rivals: this is the win rate.",
        )
    if np.ptp(longer_S) == 0:
        longer = "B" if longer_S[0] > 0 else "A"
        return LengthControlled(
            None,
            None,
            None,
            f"{longer}'s completions are longer by {abs(longer_S[0]):g} characters everywhere, so length "
            "cannot be told from quality.",
        )
    length_S = np.tanh(longer_S / longer_S.std(ddof=1))
    own = np.ones((1, len(length_S)))
    if explained_by_length(length_S, preference_S, own)[0]:
        which = "longer" if (preference_S == 1) @ length_S > 0 else "shorter"
        return LengthControlled(
            Estimate(0.5, 0.0, 1.0),
            None,
            None,
            f"The {which} completion is preferred everywhere, so nothing is known of completions of equal length.",
        )
    fitted_R2 = np.concatenate(
        [fit_length(length_S, preference_S, draw_RS, ridge=ridge) for draw_RS in draws]
    )
    explained_R = np.concatenate([explained_by_length(length_S, preference_S, draw_RS) for draw_RS in draws])
    at_equal_length_R = np.where(explained_R, 0.5, _sigmoid(fitted_R2[:, 1]))
    # A draw that prefers one model everywhere has no finite w_base; its win rate is 0 or 1.
    drawn_R = np.where(_mixed(raw_R), at_equal_length_R, np.round(raw_R))
    return LengthControlled(interval(drawn_R), float(fitted_R2[0, 0]), float(fitted_R2[0, 1]))


def _weights(prompt_S: np.ndarray, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights of the pairs, `[R, S]` in parts: first the data themselves, then draws of prompts."""
    rows = int(prompt_S.max()) + 1
    share_S = 1.0 / np.bincount(prompt_S)[prompt_S]
    yield share_S[None]
    for drawn_RN in bootstrap_counts(rows, resamples=resamples, seed=seed, block=BLOCK):
        yield drawn_RN[:, prompt_S] * share_S[None]


def _preference(preference_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """The weighted mean preference, `[R]`."""
    return weights_RS @ preference_S / weights_RS.sum(axis=1)


def explained_by_length(length_S: np.ndarray, preference_S: np.ndarray, weights_RS: np.ndarray) -> np.ndarray:
    """Whether in every pair with a weight the longer completion is preferred, or in every one the shorter, `[R]`."""
    as_longer_S = preference_S == np.heaviside(length_S, 0.5)
    as_shorter_S = preference_S == np.heaviside(-length_S, 0.5)
    equal_S = length_S == 0
    return (weights_RS @ (~as_longer_S | equal_S) == 0) | (weights_RS @ (~as_shorter_S | equal_S) == 0)


def _mixed(preference_R: np.ndarray) -> np.ndarray:
    """Where not every verdict is for the same model."""
    return (preference_R > PRECISION) & (preference_R < 1 - PRECISION)


def fit_length(
    length_S: np.ndarray, preference_S: np.ndarray, weights_RS: np.ndarray, *, ridge: float
) -> np.ndarray:
    """Weighted logistic regressions on one feature and a constant, by damped Newton steps: float64 `[R, 2]`.

    Maximizes sum_s weight_s * (p_s log m_s + (1 - p_s) log(1 - m_s)) - ridge / 2 * w_len^2 with
    m = sigma(w_len * length + w_base) for every row of weights. A step is shortened by log(1 + r) / r, r = its length
    times the largest feature vector's, with which logistic regression's Newton steps always go uphill (Bach,
    arXiv:0910.4627, section 2).

    Args:
      length_S: the feature, in [-1, 1].
      preference_S: p, in [0, 1].
      weights_RS: weights, each row with a positive sum. A row whose preferences are all 0 or all 1 has no solution; it
        keeps 0 and 0.
      ridge: positive.

    Returns:
      (w_len, w_base) of each row.
    """
    weight_R2 = np.zeros((len(weights_RS), 2))
    largest = math.sqrt(1 + float(np.square(length_S).max()))
    active = np.flatnonzero(_mixed(_preference(preference_S, weights_RS)))
    for _ in range(STEPS):
        if not active.size:
            break
        slope, base = weight_R2[active, 0], weight_R2[active, 1]
        mean_RS = _sigmoid(slope[:, None] * length_S[None] + base[:, None])
        residual_RS = weights_RS[active] * (preference_S[None] - mean_RS)
        curvature_RS = weights_RS[active] * mean_RS * (1 - mean_RS)
        gradient = np.stack([residual_RS @ length_S - ridge * slope, residual_RS.sum(axis=1)], axis=1)
        cross = curvature_RS @ length_S
        hessian = np.stack(
            [curvature_RS @ np.square(length_S) + ridge, cross, cross, curvature_RS.sum(axis=1)], axis=1
        ).reshape(-1, 2, 2)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        reach = np.maximum(largest * np.linalg.norm(step, axis=1), 1e-300)
        weight_R2[active] += step * (np.log1p(reach) / reach)[:, None]
        active = active[reach > PRECISION]
    return weight_R2


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * values))


def table(result: WinRate, *, a: str = "A", b: str = "B") -> str:
    """The result as text for a terminal."""
    controlled = result.length_controlled
    rows: list[tuple[str, Estimate | None]] = [
        ("win rate", result.win_rate),
        ("win rate, length-controlled", controlled.win_rate),
        ("preferred when shown first", result.first_preferred),
        ("verdicts that flip", result.flipped),
    ]
    lines = [f"B ({b}) against A ({a})", f"{'':30}{'value':>10}{'95 % interval':>22}"]
    for name, estimate in rows:
        numbers = (
            f"{'none':>10}"
            if estimate is None
            else f"{estimate.value:10.4f}{estimate.low:12.4f}{estimate.high:10.4f}"
        )
        lines.append(f"{name:30}{numbers}")
    if controlled.note:
        lines.append(f"  length-controlled: {controlled.note}")
    lines.append(
        f"{result.prompts:,} prompts, {result.pairs:,} pairs in both orders: {result.wins} wins, {result.losses} "
        f"losses, {result.ties} ties; sign test p = {result.sign_p:.4f}, permutation test p = "
        f"{result.permutation_p:.4f}"
    )
    lines.append(
        f"mean length {result.mean_length_a:.0f} (A) and {result.mean_length_b:.0f} (B) characters; "
        f"{result.unparsed} of {2 * result.pairs:,} verdicts could not be read and count as ties"
    )
    return "\n".join(lines)
