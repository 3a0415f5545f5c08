"""Preference data scored by a reward model, or by an ensemble of them: what `reward_report` reports on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.preference_groups import PreferenceData, PreferenceSource
from posttrain_jax.data.preference_rows import row_shape
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.rewards.ensemble import Ensemble, member_scores

LENGTH_UNITS = ("tokens", "characters")


@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """The pairs of one split with the scores that a reward model gave them; N pairs.

    Attributes:
      split: the split's name, such as "in_distribution".
      chosen_scores_N, rejected_scores_N: the scores.
      chosen_lengths_N, rejected_lengths_N: lengths of the completions.
      gain: what the scores were multiplied by after training; loss and calibration are of margins without it.
      length_unit: what lengths are counted in, "tokens" or "characters".
      margins_N: how much better the label says that the chosen one is, on the label's own scale; or None.
      probabilities_N: with what probability a person prefers the chosen one, between 0 and 1 (soft labels); or None.
      weights_N: how much each pair counts, above 0; None = 1 each.
      groups_N: what was drawn independently: the prompt's id of each pair; None = every pair for itself.
      subsets_N: the name of each pair's subset, for section scores; or None.
      rows_N: "file:line" of the row that each pair comes from, for `reward_report_files.write_rows`; or None.
      raters: each rater's own preference, by name: 1 the chosen one, -1 the rejected one, 0 a tie, NaN not asked.
      member_chosen_scores_EN, member_rejected_scores_EN: the scores of an ensemble's E members, on one scale; or None.
    """

    split: str
    chosen_scores_N: np.ndarray
    rejected_scores_N: np.ndarray
    chosen_lengths_N: np.ndarray
    rejected_lengths_N: np.ndarray
    gain: float = 1.0
    length_unit: str = "tokens"
    margins_N: np.ndarray | None = None
    probabilities_N: np.ndarray | None = None
    weights_N: np.ndarray | None = None
    groups_N: np.ndarray | None = None
    subsets_N: Sequence[str] | None = None
    rows_N: Sequence[str] | None = None
    raters: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    member_chosen_scores_EN: np.ndarray | None = None
    member_rejected_scores_EN: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.chosen_scores_N)
        if count == 0:
            raise InputError(f"There is nothing to report on: the split {self.split!r} holds no pairs.")
        if not (math.isfinite(self.gain) and self.gain > 0):
            raise InputError(
                f"The split {self.split!r}: the scores' gain is {self.gain}; it must be above 0."
            )
        if self.length_unit not in LENGTH_UNITS:
            raise InputError(f"length_unit is {self.length_unit!r}; use {' or '.join(LENGTH_UNITS)}.")
        given = {
            "rejected_scores_N": self.rejected_scores_N,
            "chosen_lengths_N": self.chosen_lengths_N,
            "rejected_lengths_N": self.rejected_lengths_N,
            "margins_N": self.margins_N,
            "probabilities_N": self.probabilities_N,
            "weights_N": self.weights_N,
            "groups_N": self.groups_N,
            "subsets_N": self.subsets_N,
            "rows_N": self.rows_N,
            **{f"the preferences of {name}": values for name, values in self.raters.items()},
        }
        for name, values in given.items():
            if values is not None and len(values) != count:
                raise InputError(
                    f"The split {self.split!r} has {count} pairs, but {name} holds {len(values)} values."
                )
        for name in ("chosen_scores_N", "rejected_scores_N"):
            scores = self.chosen_scores_N if name == "chosen_scores_N" else self.rejected_scores_N
            lost = int(np.sum(~np.isfinite(np.asarray(scores, np.float64))))
            if lost:
                raise InputError(
                    f"The split {self.split!r}: {lost} of {name} are not finite; was the model trained well?"
                )
        if self.weights_N is not None and not np.all(np.asarray(self.weights_N) > 0):
            raise InputError(f"The split {self.split!r}: every weight must be above 0; leave such pairs out.")
        members = (self.member_chosen_scores_EN, self.member_rejected_scores_EN)
        if (members[0] is None) != (members[1] is None):
            raise InputError(f"The split {self.split!r}: give both member scores or none.")
        for scores_EN in members:
            if scores_EN is not None and (scores_EN.ndim != 2 or scores_EN.shape[1] != count):
                raise InputError(
                    f"The split {self.split!r}: member scores have shape {scores_EN.shape}, not (E, {count})."
                )


def score_pairs(
    members: Sequence[LoadedModel],
    splits: Mapping[str, PreferenceData],
    mesh: Mesh,
    *,
    ensemble: Ensemble,
    groups: int,
    share_prompt: bool,
) -> list[ScoredPairs]:
    """Scores every comparison of every split; all splits are packed into rows of one shape, so one program is compiled.

    A comparison whose soft label is 1/2, or of weight 0, says nothing and is left out. Where the data name raters, a
    rater's preference is the sign of the difference of that rater's own ratings. The gain is the mean of the members'.

    Args:
      members: of an ensemble, or a single model.
      splits: data by the split's name.
      mesh: where the members' parameters are.
      ensemble: how the members' scores become one.
      groups: prompts at once; a multiple of mesh.data x mesh.fsdp.
      share_prompt: whether the completions of a prompt share it (`RowShape`).

    Raises:
      InputError: a split holds no comparison.
    """
    compared = {name: _compared(name, data) for name, data in splits.items()}
    gain = float(np.mean([np.asarray(member.params["score_head"]["gain"]) for member in members]))
    shape = row_shape(list(compared.values()), groups=groups, share_prompt=share_prompt)
    scored = []
    for name, data in compared.items():
        parts = []
        for source in data.sources:
            scores_SE = member_scores(members, source, shape, mesh, groups=groups)
            parts.append(_part(source, scores_SE, ensemble(scores_SE)))
        scored.append(_joined(name, data, parts, members=len(members), gain=gain))
    return scored


def _compared(name: str, data: PreferenceData) -> PreferenceData:
    """The groups with a comparison that says something."""
    sources = []
    for source in data.sources:
        says_C = _says_something(source)
        totals_G = np.diff(np.concatenate([[0], np.cumsum(says_C)])[source.arrays.comparison_starts])
        kept = np.flatnonzero(totals_G[source.index] > 0)
        if len(kept):
            sources.append(source.select(kept))
    if not sources:
        raise InputError(
            f"The split {name!r} ({', '.join(source.report.source for source in data.sources)}) holds no comparison of "
            "two completions (ties, labels and ratings of single completions are none); give data with chosen and "
            "rejected, or with completions and their ranks, scores or ratings."
        )
    return dataclasses.replace(data, sources=tuple(sources))


def _says_something(source: PreferenceSource) -> np.ndarray:
    return (source.arrays.weight > 0) & (source.arrays.probability != 0.5)


@dataclasses.dataclass(frozen=True)
class _Part:
    """The comparisons of one source: places of the two completions in its store, and what goes with them."""

    chosen_N: np.ndarray
    rejected_N: np.ndarray
    margins_N: np.ndarray
    probabilities_N: np.ndarray
    weights_N: np.ndarray
    prompts_N: list[bytes]
    rows_N: list[str]
    subsets_N: list[str]
    source: PreferenceSource
    scores_SE: np.ndarray
    combined_S: np.ndarray

    def lengths(self, places_N: np.ndarray) -> np.ndarray:
        """Tokens of completions, without their prompt."""
        lengths_S = np.add.reduceat(
            np.asarray(self.source.store.loss_mask, np.int64), self.source.store.offsets[:-1]
        )
        return lengths_S[places_N]

    def rater(self, name: str) -> np.ndarray:
        """1, 0 or -1 where the rater rated both completions, else NaN."""
        if name not in self.source.rater_names:
            return np.full(len(self.chosen_N), np.nan)
        ratings_S = self.source.arrays.rater_scores[:, self.source.rater_names.index(name)]
        return np.sign(ratings_S[self.chosen_N] - ratings_S[self.rejected_N])


def _part(source: PreferenceSource, scores_SE: np.ndarray, combined_S: np.ndarray) -> _Part:
    arrays = source.arrays
    says_C = _says_something(source)
    places, groups = [], []
    for number, g in enumerate(source.index.tolist()):
        first, last = arrays.comparison_starts[g], arrays.comparison_starts[g + 1]
        here = first + np.flatnonzero(says_C[first:last])
        places.append(here)
        groups.append(np.full(len(here), number))
    place_N, group_N = np.concatenate(places), np.concatenate(groups)
    start_N = arrays.starts[source.index[group_N]]
    prompts = [source.identity(i) for i in range(len(source))]
    return _Part(
        chosen_N=start_N + arrays.better[place_N],
        rejected_N=start_N + arrays.worse[place_N],
        margins_N=arrays.margin[place_N],
        probabilities_N=arrays.probability[place_N],
        weights_N=arrays.weight[place_N],
        prompts_N=[prompts[i] for i in group_N],
        rows_N=[source.row_id(i) for i in group_N],
        subsets_N=[source.subset(i) for i in group_N],
        source=source,
        scores_SE=scores_SE,
        combined_S=combined_S,
    )


def _joined(
    name: str, data: PreferenceData, parts: Sequence[_Part], *, members: int, gain: float
) -> ScoredPairs:
    margins_N = np.concatenate([part.margins_N for part in parts])
    probabilities_N = np.concatenate([part.probabilities_N for part in parts])
    numbers: dict[bytes, int] = {}
    raters = sorted({rater for source in data.sources for rater in source.rater_names})
    subsets = [subset for part in parts for subset in part.subsets_N]
    each = {rater: np.concatenate([part.rater(rater) for part in parts]) for rater in raters}

    def member_scores(sides: Sequence[np.ndarray]) -> np.ndarray | None:
        if members == 1:
            return None
        return np.concatenate([part.scores_SE[side] for part, side in zip(parts, sides, strict=True)]).T

    return ScoredPairs(
        split=name,
        chosen_scores_N=np.concatenate([part.combined_S[part.chosen_N] for part in parts]),
        rejected_scores_N=np.concatenate([part.combined_S[part.rejected_N] for part in parts]),
        chosen_lengths_N=np.concatenate([part.lengths(part.chosen_N) for part in parts]),
        rejected_lengths_N=np.concatenate([part.lengths(part.rejected_N) for part in parts]),
        gain=gain,
        margins_N=margins_N if np.any(margins_N) else None,
        probabilities_N=probabilities_N if np.any(probabilities_N != 1) else None,
        weights_N=np.concatenate([part.weights_N for part in parts]),
        groups_N=np.asarray(
            [numbers.setdefault(prompt, len(numbers)) for part in parts for prompt in part.prompts_N]
        ),
        rows_N=[row for part in parts for row in part.rows_N],
        subsets_N=subsets if any(subsets) else None,
        raters={rater: said_N for rater, said_N in each.items() if np.isfinite(said_N).any()},
        member_chosen_scores_EN=member_scores([part.chosen_N for part in parts]),
        member_rejected_scores_EN=member_scores([part.rejected_N for part in parts]),
    )
