"""Token ids, masks and comparisons of preference data, made once and kept in a cache on disk.

The sequences (a prompt with one completion each) lie in a `store` folder; what is said of them lies beside it in
`groups.npz`. A group is one row of the data: K sequences that begin with the same prompt.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain_jax import assets
from posttrain_jax.data.cache_key import SourceRows, cache_key, canonical, tokenizer_fingerprint
from posttrain_jax.data.chat import Encoded
from posttrain_jax.data.columns import unused_text
from posttrain_jax.data.parallel_encoder import ParallelEncoder
from posttrain_jax.data.preferences import Comparison, Preference, to_preference
from posttrain_jax.data.rows import Row, RowError
from posttrain_jax.data.shown_row import plain_text_warning
from posttrain_jax.data.sources import Spec, weighted_sources
from posttrain_jax.data.store import StoredSequences, StoreWriter, publish, read_store
from posttrain_jax.data.tokenized import (
    DEFAULT_OPTIONS,
    TokenizeOptions,
    check_bad_rows,
    in_chunks,
    rejection,
    write_rejected,
)
from posttrain_jax.errors import InputError

FORMAT_VERSION = 5
"""Raise it when the same rows become other groups, or `groups.npz` another layout."""

NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class PreferenceReport:
    """What became of one source. Lengths are tokens of completions, per comparison.

    rows = groups + bad + dropped + difference_cut. A reward model that counts tokens is right `longer_chosen` of the
    time. `lost` comparisons are of completions that are the same tokens, in rows whose other comparisons are kept;
    losses over rankings keep them, for a completion's rank is what the data say (as a constant, without a gradient).
    `repeated` rows said their prompt twice; it is taken once. `unused`: rows that have each column that is not used.
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
    labelled: int = 0
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
        if self.labelled:
            parts.append(f"{self.labelled:,} labels, {self.good / self.labelled:.1%} good")
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
      better, worse: int32 `[C]`, places in the group.
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
      comparisons: of places in `sequences`.
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
      arrays: what is said of them.
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
        """The groups at these places of this source."""
        return dataclasses.replace(self, index=self.index[chosen])

    def needs(self, *, share_prompt: bool) -> np.ndarray:
        """int64, places in a row that each group takes."""
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


def build_preferences(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions = DEFAULT_OPTIONS,
    *,
    cache_dir: pathlib.Path | None = None,
    rejected_path: pathlib.Path | None = None,
) -> PreferenceData:
    """Tokenises preference rows of a path, or of a list of (source, weight), through the cache.

    Args and errors are those of `tokenized.build`; `options.max_length` bounds a prompt with one completion.
    """
    root = (cache_dir if cache_dir is not None else assets.cache_root()) / "preferences"
    options = options.at_one_time()
    tokenizer_key = tokenizer_fingerprint(tokenizer, options.chat)
    sources, folders = [], []
    for source, weight in weighted_sources(spec):
        rows = SourceRows(source)
        kept = [options.max_length, options.truncate, options.ignore_columns]
        key = cache_key(rows, tokenizer_key, ["preferences", FORMAT_VERSION, *kept])
        found = _read(root / key)
        if found is None:
            with publish(root / key, read=_read) as scratch:
                _write(scratch, rows, tokenizer, options)
            found = _read(root / key)
        if found is None:
            raise InputError(
                f"the preference data in {root / key} cannot be read back; delete it and try again"
            )
        store, arrays = found
        report = PreferenceReport(**store.meta["report"])
        sources.append(
            PreferenceSource(store, arrays, np.arange(report.groups, dtype=np.int64), weight, report)
        )
        folders.append(root / key)
    check_bad_rows([source.report.bad for source in sources], folders, options)
    for item in sources:
        if not len(item):
            raise InputError(f"no preference is left to train on: {item.report.text()}")
    if rejected_path is not None and options.on_bad_row == "skip":
        write_rejected(rejected_path, sum(item.report.bad for item in sources), folders)
    return PreferenceData(tuple(sources))


def _read(folder: pathlib.Path) -> tuple[StoredSequences, GroupArrays] | None:
    store = read_store(folder)
    if store is None:
        return None
    try:
        with (folder / "groups.npz").open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = GroupArrays(
                **{field.name: file[field.name] for field in dataclasses.fields(GroupArrays)}
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return (store, arrays) if arrays.starts[-1] == len(store.lines) else None


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A row that is kept: its preference, its comparisons that still differ, and its sequences."""

    row: Row
    preference: Preference
    comparisons: tuple[Comparison, ...]
    sequences: tuple[Encoded, ...]
    shared: int


def _write(
    folder: pathlib.Path, rows: SourceRows, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions
) -> None:
    """Reads, converts, encodes and truncates every row, a chunk at a time."""
    counts = dict.fromkeys(
        (
            "rows",
            "bad",
            "duplicates",
            "truncated",
            "dropped",
            "difference_cut",
            "lost",
            "ties",
            "repeated",
            "plain",
        ),
        0,
    )
    unused: collections.Counter[str] = collections.Counter()
    files: dict[str, int] = {}
    seen: set[bytes] = set()
    kept: list[_Summary] = []
    with (
        ParallelEncoder(tokenizer, chat=options.chat) as encoder,
        StoreWriter(folder) as writer,
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        for chunk in in_chunks(rows, progress=options.progress):
            for row, result in _encode(chunk, encoder, options, seen, counts, unused):
                outcome = result if isinstance(result, RowError) else _fit(row, *result, options, counts)
                if isinstance(outcome, RowError):
                    counts["bad"] += 1
                    rejected.write(rejection(row, outcome) + "\n")
                elif outcome is not None:
                    sequences = outcome.sequences
                    writer.append(
                        [encoded.tokens for encoded in sequences],
                        [encoded.loss_mask for encoded in sequences],
                        [files.setdefault(row.source, len(files))] * len(sequences),
                        [row.line] * len(sequences),
                    )
                    kept.append(_summary(outcome))
                    counts["ties"] += outcome.preference.ties
    raters = sorted({name for summary in kept for name in summary.raters})
    subsets = sorted({summary.subset for summary in kept})
    arrays = _arrays(kept, raters, subsets)
    with (folder / "groups.npz").open("wb") as file:
        np.savez(file, **vars(arrays))
        file.flush()
        os.fsync(file.fileno())
    digest = hashlib.sha256(writer.sha256().encode())
    for array in vars(arrays).values():
        digest.update(np.ascontiguousarray(array).tobytes())
    report = _report(rows.source, counts, unused, kept)
    meta = {
        "files": list(files),
        "raters": raters,
        "subsets": subsets,
        "report": dataclasses.asdict(report),
        "sha256": digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _encode(
    chunk: Sequence[Row],
    encoder: ParallelEncoder,
    options: TokenizeOptions,
    seen: set[bytes],
    counts: dict[str, int],
    unused: collections.Counter[str],
) -> Iterator[tuple[Row, tuple[Preference, list[Encoded]] | RowError]]:
    """Each row with its preference and sequences, or what is wrong with it, in order."""
    results: list[Preference | RowError] = []
    for row in chunk:
        counts["rows"] += 1
        try:
            preference = to_preference(options.columns(row), text_as=options.chat.text_as)
            results.append(preference)
            counts["repeated"] += preference.repeated
            counts["plain"] += encoder.has_template and preference.completions[0].prompt is not None
            unused.update(preference.unused)
            digest = hashlib.blake2b(canonical(row.value).encode(), digest_size=16).digest()
            counts["duplicates"] += digest in seen
            seen.add(digest)
        except RowError as error:
            results.append(error)
    encoded = iter(encoder.encode([c for p in results if isinstance(p, Preference) for c in p.completions]))
    for row, result in zip(chunk, results, strict=True):
        if isinstance(result, RowError):
            yield row, result
            continue
        sequences = [next(encoded) for _ in result.completions]
        refused = next(
            (
                RowError(f"{_side(result, k)}.{s.column}", s.reason)
                for k, s in enumerate(sequences)
                if isinstance(s, RowError)
            ),
            None,
        )
        whole = [s for s in sequences if isinstance(s, Encoded)]
        partly = next((k for k, s in enumerate(whole) if s.untrained_turns), None)
        if refused is None and partly is not None:
            refused = RowError(
                _side(result, partly),
                "has turns that this chat template does not show as the model writes them (it leaves out their "
                "thoughts), so it cannot be compared whole; set data.chat_template to one that keeps thoughts",
            )
        yield row, refused or (result, whole)


def _side(preference: Preference, place: int) -> str:
    """What a completion is called in the row it came from."""
    if len(preference.completions) == 2 and not preference.ratings:
        return ("chosen", "rejected")[place]
    return "completion" if len(preference.completions) == 1 else f"completions[{place}]"


def _fit(
    row: Row,
    preference: Preference,
    sequences: list[Encoded],
    options: TokenizeOptions,
    counts: dict[str, int],
) -> _Kept | RowError | None:
    """The row under the truncation policy; None when it is dropped.

    What a template writes after the end of the last turn (ChatML: a newline) goes first: a sequence ends with the last
    token that is trained, the one at which a reward model is read, here as when answers of a policy are scored.
    """
    limit = options.max_length
    sequences = [until_the_end(encoded) for encoded in sequences]
    longest = max(len(encoded.tokens) for encoded in sequences)
    if limit and longest > limit:
        if options.truncate == "error":
            return RowError(
                "(row)",
                f"has a completion that ends at {longest} tokens, more than data.max_length={limit}; raise that, or "
                "set data.truncate to right or drop",
            )
        if options.truncate == "drop":
            counts["dropped"] += 1
            return None
        sequences = [Encoded(e.tokens[:limit], e.loss_mask[:limit]) for e in sequences]
    if not all(encoded.loss_mask.any() for encoded in sequences):
        counts["dropped"] += 1
        return None
    differing = tuple(
        c
        for c in preference.comparisons
        if not np.array_equal(sequences[c.better].tokens, sequences[c.worse].tokens)
    )
    if preference.comparisons and not differing:
        if not (limit and longest > limit):
            return RowError("rejected", "becomes the same tokens as chosen, so there is nothing to prefer")
        counts["difference_cut"] += 1
        return None
    counts["truncated"] += bool(limit and longest > limit)
    counts["lost"] += len(preference.comparisons) - len(differing)
    return _Kept(row, preference, differing, tuple(sequences), _shared_tokens(sequences))


def until_the_end(encoded: Encoded) -> Encoded:
    """Without the tokens after the last trained one."""
    trained = np.flatnonzero(encoded.loss_mask)
    if not len(trained):
        return encoded
    count = int(trained[-1]) + 1
    return Encoded(encoded.tokens[:count], encoded.loss_mask[:count])


def _shared_tokens(sequences: Sequence[Encoded]) -> int:
    if len(sequences) == 1:
        return 0
    first = sequences[0].tokens
    same = min(len(encoded.tokens) for encoded in sequences)
    for other in sequences[1:]:
        differs = np.flatnonzero(first[:same] != other.tokens[:same])
        same = int(differs[0]) if len(differs) else same
    return max(0, min(same, *(int(np.argmax(encoded.loss_mask)) - 1 for encoded in sequences)))


@dataclasses.dataclass(frozen=True)
class _Summary:
    """What stays of a kept row once its tokens are written."""

    lengths: tuple[int, ...]
    completion_lengths: tuple[int, ...]
    shared: int
    comparisons: tuple[Comparison, ...]
    ranks: tuple[int, ...]
    ratings: tuple[float, ...]
    label: int
    raters: dict[str, tuple[float, ...]]
    subset: str


def _summary(kept: _Kept) -> _Summary:
    preference = kept.preference
    count = len(kept.sequences)
    return _Summary(
        lengths=tuple(len(encoded.tokens) for encoded in kept.sequences),
        completion_lengths=tuple(int(encoded.loss_mask.sum()) for encoded in kept.sequences),
        shared=kept.shared,
        comparisons=kept.comparisons,
        ranks=preference.ranks,
        ratings=preference.ratings or (math.nan,) * count,
        label=NO_LABEL if preference.label is None else int(preference.label),
        raters=preference.raters,
        subset=preference.subset,
    )


def _arrays(kept: Sequence[_Summary], raters: Sequence[str], subsets: Sequence[str]) -> GroupArrays:
    comparisons = [c for group in kept for c in group.comparisons]
    scores = [
        [group.raters[name][k] if name in group.raters else math.nan for name in raters]
        for group in kept
        for k in range(len(group.lengths))
    ]
    return GroupArrays(
        starts=np.cumsum([0, *(len(group.lengths) for group in kept)], dtype=np.int64),
        shared=np.asarray([group.shared for group in kept], np.int32),
        comparison_starts=np.cumsum([0, *(len(group.comparisons) for group in kept)], dtype=np.int64),
        better=np.asarray([c.better for c in comparisons], np.int32),
        worse=np.asarray([c.worse for c in comparisons], np.int32),
        weight=np.asarray([c.weight for c in comparisons], np.float32),
        margin=np.asarray([c.margin for c in comparisons], np.float32),
        probability=np.asarray([c.probability for c in comparisons], np.float32),
        ranks=np.asarray([rank for group in kept for rank in group.ranks], np.int32),
        ratings=np.asarray([r for group in kept for r in group.ratings], np.float32),
        labels=np.asarray([group.label for group in kept for _ in group.lengths], np.int8),
        rater_scores=np.asarray(scores, np.float32).reshape(len(scores), len(raters)),
        subsets=np.asarray([subsets.index(group.subset) for group in kept], np.int32),
    )


def _report(
    source: str, counts: dict[str, int], unused: dict[str, int], kept: Sequence[_Summary]
) -> PreferenceReport:
    pairs = np.asarray(
        [
            (group.completion_lengths[c.better], group.completion_lengths[c.worse])
            for group in kept
            for c in group.comparisons
        ],
        np.float64,
    ).reshape(-1, 2)
    labels = [group.label for group in kept if group.label != NO_LABEL]
    return PreferenceReport(
        source=source,
        unused=dict(unused),
        groups=len(kept),
        comparisons=len(pairs),
        good=sum(labels),
        labelled=len(labels),
        rated=sum(not math.isnan(r) for group in kept for r in group.ratings),
        tokens=sum(sum(group.lengths) for group in kept),
        shared_tokens=sum(group.shared * (len(group.lengths) - 1) for group in kept),
        chosen_length=float(pairs[:, 0].mean()) if len(pairs) else 0.0,
        rejected_length=float(pairs[:, 1].mean()) if len(pairs) else 0.0,
        longer_chosen=float(np.mean(pairs[:, 0] > pairs[:, 1])) if len(pairs) else 0.0,
        **counts,
    )
