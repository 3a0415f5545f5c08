"""Groups of preference data as they are read back from the cache: K sequences that begin with the same prompt,
with their comparisons, ranks, ratings and labels.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from posttrain_jax.data.chat import Encoded
from posttrain_jax.data.preferences import Comparison
from posttrain_jax.data.rows import unused_text
from posttrain_jax.data.shown_row import plain_text_warning
from posttrain_jax.data.store import StoredSequences

NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class PreferenceReport:
    """What became of one source. Lengths are tokens of completions, per comparison.

    rows = groups + bad + dropped + difference_cut. A reward model that counts tokens is right `longer_chosen` of the
    time. `lost` comparisons are of completions that are the same tokens, in rows whose other comparisons are kept;
    losses over rankings keep them, for a completion's rank is what the data say (as a constant, without a gradient).
    `repeated` rows hold their prompt twice; it is taken once. `unused`: rows that have each column that is not used.
    """

    source: str
    rows: int = 0
    groups: int = 0
    bad: int = 0
    duplicates: int = 0
    truncated: int = 0
    dropped: int = 0
    difference_cut: int = 0
    lost: int = 0
    ties: int = 0
    repeated: int = 0
    plain: int = 0
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    comparisons: int = 0
    good: int = 0
    labeled: int = 0
    rated: int = 0
    tokens: int = 0
    shared_tokens: int = 0
    chosen_length: float = 0.0
    rejected_length: float = 0.0
    longer_chosen: float = 0.0

    def text(self) -> str:
        """A line or two for the console."""
        parts = [f"{self.source}: {self.rows:,} rows -> {self.groups:,} prompts"]
        if self.comparisons:
            parts.append(f"{self.comparisons:,} comparisons")
        if self.labeled:
            parts.append(f"{self.labeled:,} labels, {self.good / self.labeled:.1%} good")
        if self.rated:
            parts.append(f"{self.rated:,} ratings")
        share = self.shared_tokens / max(self.tokens, 1)
        parts.append(f"{self.tokens:,} tokens ({share:.1%} in prompts that completions share)")
        counted = [
            (self.ties, "ties left out"),
            (self.truncated, "cut to max_length"),
            (self.dropped, "dropped (too long, or no completion was left)"),
            (self.difference_cut, "dropped (the same once cut to max_length)"),
            (self.lost, "comparisons of the same tokens left out"),
            (self.bad, "bad and skipped"),
            (self.duplicates, "duplicates (kept)"),
            (self.repeated, "repeated the prompt in completions (taken once)"),
        ]
        parts += [f"{count:,} {what}" for count, what in counted if count]
        parts += [f"columns not used: {unused_text(self.unused)}"] if self.unused else []
        line = "; ".join(parts)
        if self.comparisons:
            line += (
                f". Chosen completions have {self.chosen_length:.0f} tokens, rejected {self.rejected_length:.0f}; "
                f"the longer one was chosen in {self.longer_chosen:.1%} of comparisons"
            )
        return f"{line}."

    def warning(self) -> str:
        """What may not be meant; "" = nothing."""
        return plain_text_warning(self.plain, self.rows, "data.text_as=chat") if self.plain else ""


@dataclasses.dataclass(frozen=True)
class GroupArrays:
    """What `groups.npz` holds, for G groups, S sequences and C comparisons.

    Attributes:
      starts: int64 `[G + 1]`, group g has the sequences starts[g]:starts[g + 1].
      shared: int32 `[G]`, tokens at the start that all sequences of the group have and that nothing is trained on; the
        last token of the prompt is not among them, for it predicts each completion's first.
      comparison_starts: int64 `[G + 1]`.
      better, worse: int32 `[C]`, indices in the group.
      weight, margin, probability: float32 `[C]`.
      ranks: int32 `[S]`, as the data say: 0 = best of its group, equal = tied.
      ratings: float32 `[S]`, NaN where there is none.
      labels: int8 `[S]`, 1 = good, 0 = bad, NO_LABEL.
      rater_scores: float32 `[S, raters]`, NaN where a rater gave none.
      subsets: int32 `[G]`, the place of the group's subset among the store's names of them; "" is one, too.
    """

    starts: np.ndarray
    shared: np.ndarray
    comparison_starts: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    weight: np.ndarray
    margin: np.ndarray
    probability: np.ndarray
    ranks: np.ndarray
    ratings: np.ndarray
    labels: np.ndarray
    rater_scores: np.ndarray
    subsets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt and its completions.

    Attributes:
      number: in its source's store.
      sequences: the prompt with each completion.
      first_sequence: the store's number of the first of them.
      shared: see `GroupArrays`.
      comparisons: of indices in `sequences`.
      ranks: int32 `[K]`, 0 = best, equal = tied.
      ratings: float32 `[K]`, NaN where there is none.
      labels: int8 `[K]`.
    """

    number: int
    sequences: tuple[Encoded, ...]
    first_sequence: int
    shared: int
    comparisons: tuple[Comparison, ...]
    ranks: np.ndarray
    ratings: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class PreferenceSource:
    """The groups of one source, or some of them.

    Attributes:
      store: the sequences on disk.
      arrays: their comparisons, ranks, ratings and labels.
      index: int64, the groups of the store that belong here.
      weight: share in a mixture.
      report: counts over the whole source.
    """

    store: StoredSequences
    arrays: GroupArrays
    index: np.ndarray
    weight: float
    report: PreferenceReport

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        """int64, tokens in each sequence of the groups."""
        starts = self.arrays.starts
        of_group = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        return np.diff(self.store.offsets)[np.isin(of_group, self.index)]

    @property
    def rater_names(self) -> list[str]:
        """The columns of `rater_scores`."""
        return list(self.store.meta["raters"])

    def subset(self, i: int) -> str:
        """The subset that group i belongs to, or ""."""
        return str(self.store.meta["subsets"][self.arrays.subsets[self.index[i]]])

    def group(self, i: int) -> Group:
        """Group i, its tokens as views of the mapped files."""
        g = int(self.index[i])
        arrays, offsets = self.arrays, self.store.offsets
        first, last = int(arrays.starts[g]), int(arrays.starts[g + 1])
        compared = slice(int(arrays.comparison_starts[g]), int(arrays.comparison_starts[g + 1]))
        columns = (arrays.better, arrays.worse, arrays.weight, arrays.margin, arrays.probability)
        rows = zip(*(column[compared].tolist() for column in columns), strict=True)
        return Group(
            number=g,
            sequences=tuple(
                Encoded(
                    self.store.tokens[offsets[s] : offsets[s + 1]],
                    self.store.loss_mask[offsets[s] : offsets[s + 1]],
                )
                for s in range(first, last)
            ),
            first_sequence=first,
            shared=int(arrays.shared[g]),
            comparisons=tuple(Comparison(*row) for row in rows),
            ranks=arrays.ranks[first:last],
            ratings=arrays.ratings[first:last],
            labels=arrays.labels[first:last],
        )

    def completion_tokens(self, i: int) -> list[bytes]:
        """The token ids of group i's sequences, as bytes."""
        first, last = self.arrays.starts[self.index[i]], self.arrays.starts[self.index[i] + 1]
        ends = self.store.offsets[first : last + 1].tolist()
        return [self.store.tokens[a:b].tobytes() for a, b in itertools.pairwise(ends)]

    def identity(self, i: int) -> bytes:
        """What makes two groups belong together: the prompt's tokens."""
        first = self.group(i).sequences[0]
        return first.tokens[: int(np.argmax(first.loss_mask))].tobytes()

    def row_id(self, i: int) -> str:
        """ "file:line" of the row that group i came from."""
        at = int(self.arrays.starts[self.index[i]])
        return f"{self.store.meta['files'][self.store.files[at]]}:{self.store.lines[at]}"

    def select(self, chosen: np.ndarray) -> PreferenceSource:
        """The groups with these indices in this source."""
        return dataclasses.replace(self, index=self.index[chosen])

    def needs(self, *, share_prompt: bool) -> np.ndarray:
        """int64, tokens of a row that each group takes."""
        lengths = np.diff(self.store.offsets)
        starts = self.arrays.starts[:-1]
        total = np.add.reduceat(lengths, starts) if len(starts) else np.zeros(0, np.int64)
        if share_prompt:
            total = total - (np.diff(self.arrays.starts) - 1) * self.arrays.shared
        return total[self.index]


@dataclasses.dataclass(frozen=True)
class PreferenceData:
    """What `build_preferences` returns: the sources of a mixture, each apart."""

    sources: tuple[PreferenceSource, ...]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def text(self) -> str:
        """The sources' reports, one line each."""
        return "\n".join(source.report.text() for source in self.sources)

    def warning(self) -> str:
        """What may not be meant, a line for each source that has something; "" = nothing."""
        return "\n".join(filter(None, (source.report.warning() for source in self.sources)))
