"""Token ids, masks and comparisons of preference data, made once and kept in a cache on disk.

The sequences (a prompt with one completion each) lie in a `store` folder; their comparisons, ranks, ratings and labels
lie beside it in `groups.npz`. A group is one row of the data: K sequences that begin with the same prompt.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.cache import cache_root
from posttrain_jax.data.chat import Encoded, ParallelEncoder
from posttrain_jax.data.preference_groups import (
    NO_LABEL,
    GroupArrays,
    PreferenceData,
    PreferenceReport,
    PreferenceSource,
)
from posttrain_jax.data.preferences import Comparison, Preference, to_preference
from posttrain_jax.data.rows import Row, RowError
from posttrain_jax.data.sources import Spec
from posttrain_jax.data.store import (
    SourceRows,
    StoredSequences,
    StoreWriter,
    canonical,
    check_sources,
    read_store,
    rejection,
)
from posttrain_jax.data.tokenized import (
    DEFAULT_OPTIONS,
    TokenizeOptions,
    cached_sources,
    in_chunks,
)

FORMAT_VERSION = 6
"""Raise it when the same rows become other groups, or `groups.npz` another layout."""


def build_preferences(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions = DEFAULT_OPTIONS,
    *,
    cache_dir: pathlib.Path | None = None,
    rejected_path: pathlib.Path | None = None,
) -> PreferenceData:
    """Tokenizes preference rows of a path, or of a list of (source, weight), through the cache.

    Args and errors are those of `tokenized.build`; `options.max_length` bounds a prompt with one completion.
    """
    entries = cached_sources(
        spec,
        tokenizer,
        options,
        (cache_dir if cache_dir is not None else cache_root()) / "preferences",
        ["preferences", FORMAT_VERSION, options.max_length, options.truncate],
        read=_read,
        write=_write,
    )
    sources = []
    for entry in entries:
        store, arrays = entry.stored
        report = PreferenceReport(**store.meta["report"])
        index = np.arange(report.groups, dtype=np.int64)
        sources.append(PreferenceSource(store, arrays, index, entry.weight, report))
    check_sources(sources, [entry.folder for entry in entries], options.on_bad_row, rejected_path)
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
            preference = to_preference(row.columns(), text_as=options.chat.text_as)
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
    token that is trained, the one at which a reward model is read, here as when completions of a policy are scored.
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
        labeled=len(labels),
        rated=sum(not math.isnan(r) for group in kept for r in group.ratings),
        tokens=sum(sum(group.lengths) for group in kept),
        shared_tokens=sum(group.shared * (len(group.lengths) - 1) for group in kept),
        chosen_length=float(pairs[:, 0].mean()) if len(pairs) else 0.0,
        rejected_length=float(pairs[:, 1].mean()) if len(pairs) else 0.0,
        longer_chosen=float(np.mean(pairs[:, 0] > pairs[:, 1])) if len(pairs) else 0.0,
        **counts,
    )
