"""Builds token ids and loss masks from data sources once, and keeps them in a cache on disk.

What the key of a cache entry depends on is in `cache_key`; how an entry is stored, in `store`.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.cache import cache_root
from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat import TRAIN_ON, Encoded, ParallelEncoder
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.rows import AS_IN_THE_FILE, ColumnNames, Row, RowError, unused_text
from posttrain_jax.data.shown_row import plain_text_warning
from posttrain_jax.data.sources import Spec, weighted_sources
from posttrain_jax.data.store import (
    SourceRows,
    StoredSequences,
    StoreWriter,
    cache_key,
    canonical,
    check_sources,
    publish,
    read_store,
    rejection,
    tokenizer_fingerprint,
)

TRUNCATE = ("right", "drop", "error")
ON_BAD_ROW = ("stop", "skip")
_CHUNK = 1024
_SILENT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class TokenizeOptions:
    """How rows become sequences.

    Attributes:
      max_length: longest sequence (tokens); 0 = no limit.
      truncate: what happens to a longer one: "right" cuts its end (and drops it when nothing trained is left),
        "drop" leaves it out, "error" makes it a bad row.
      train_on: "all_turns" or "last_turn".
      chat: how chats become text.
      on_bad_row: "stop" raises before anything is trained; "skip" leaves bad rows out and lists them.
      columns: what the columns of the files are called here, and which are left out.
      progress: whether a bar is shown where it takes long (one process of a run shows it).
    """

    max_length: int = 0
    truncate: str = "right"
    train_on: str = "all_turns"
    chat: ChatOptions = DEFAULT_CHAT
    on_bad_row: str = "stop"
    columns: ColumnNames = AS_IN_THE_FILE
    progress: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("truncate", self.truncate, TRUNCATE),
            ("train_on", self.train_on, TRAIN_ON),
            ("on_bad_row", self.on_bad_row, ON_BAD_ROW),
        ):
            if value not in known:
                raise InputError(f"data.{name} is {value!r}; it must be one of {', '.join(known)}")
        if self.max_length < 0 or self.max_length == 1:
            raise InputError(f"data.max_length is {self.max_length}; a sequence needs at least 2 tokens")

    def at_one_time(self) -> TokenizeOptions:
        """With the present as the date that a template shows, so that all rows show the same."""
        if self.chat.now is not None:
            return self
        return dataclasses.replace(self, chat=dataclasses.replace(self.chat, now=datetime.datetime.now()))


DEFAULT_OPTIONS = TokenizeOptions()


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of one source. rows = sequences + bad + dropped; `truncated` sequences are kept, `duplicates` too.

    `repeated` rows hold their prompt twice; it is taken once. `unused`: rows that have each column that is not used.
    """

    source: str
    rows: int
    sequences: int
    bad: int
    duplicates: int
    truncated: int
    dropped: int
    tokens: int
    trained_tokens: int
    repeated: int
    unused: dict[str, int]
    untrained_turns: int
    plain: int

    def text(self) -> str:
        """One line for the console."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        line = (
            f"{self.source}: {self.rows:,} rows -> {self.sequences:,} sequences, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} trained ({share:.1f} %)"
        )
        counted = [
            (self.truncated, "cut to max_length"),
            (self.dropped, "dropped (too long, or nothing trained was left)"),
            (self.bad, "bad and skipped"),
            (self.duplicates, "duplicates (kept)"),
            (self.repeated, "repeated the prompt in the completion (taken once)"),
            (
                self.untrained_turns,
                "turns not trained, because the chat template does not show them as the model writes them (it leaves "
                "out their thoughts)",
            ),
        ]
        parts = [line, *(f"{count:,} {what}" for count, what in counted if count)]
        parts += [f"columns not used: {unused_text(self.unused)}"] if self.unused else []
        return "; ".join(parts)

    def warning(self) -> str:
        """What may not be meant; "" = nothing."""
        return plain_text_warning(self.plain, self.rows, "data.text_as=chat") if self.plain else ""


@dataclasses.dataclass(frozen=True)
class TokenizedSource:
    """The sequences of one source, or some of them, memory-mapped.

    Attributes:
      store: the arrays on disk.
      index: int64 `[S]`, the sequences of the store that belong here.
      weight: share in a mixture.
      report: counts over the whole source.
    """

    store: StoredSequences
    index: np.ndarray
    weight: float
    report: Report

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[S]`, tokens in each sequence."""
        return self.store.offsets[self.index + 1] - self.store.offsets[self.index]

    def sequence(self, i: int) -> Encoded:
        """Sequence i, as views of the mapped files."""
        at = self.index[i]
        start, stop = self.store.offsets[at], self.store.offsets[at + 1]
        return Encoded(self.store.tokens[start:stop], self.store.loss_mask[start:stop])

    def identity(self, i: int) -> bytes:
        """What makes two sequences the same: tokens and mask."""
        encoded = self.sequence(i)
        return encoded.tokens.tobytes() + encoded.loss_mask.tobytes()

    def row_id(self, i: int) -> str:
        """ "file:line" of the row that sequence i came from."""
        at = self.index[i]
        return f"{self.store.meta['files'][self.store.files[at]]}:{self.store.lines[at]}"

    def select(self, chosen: np.ndarray) -> TokenizedSource:
        """The sequences with these indices in this source."""
        return dataclasses.replace(self, index=self.index[chosen])


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """What `build` returns: the sources of a mixture, each tokenized apart."""

    sources: tuple[TokenizedSource, ...]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def text(self) -> str:
        """The sources' reports, one line each."""
        return "\n".join(source.report.text() for source in self.sources)

    def warning(self) -> str:
        """What may not be meant, a line for each source that has something; "" = nothing."""
        return "\n".join(filter(None, (source.report.warning() for source in self.sources)))


def build(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions = DEFAULT_OPTIONS,
    *,
    cache_dir: pathlib.Path | None = None,
    rejected_path: pathlib.Path | None = None,
) -> TokenizedData:
    """Tokenizes a path, or a list of (source, weight), through the cache.

    Args:
      spec: what `data.train` holds.
      tokenizer: a fast tokenizer of transformers, with its chat template if it has one.
      options: how rows become sequences.
      cache_dir: where to keep the arrays; by default `$POSTTRAIN_CACHE` or `~/.cache/posttrain_jax`.
      rejected_path: with on_bad_row="skip", bad rows are written here as JSON Lines (removed when there are none).

    Raises InputError for data that is missing or empty, for bad rows unless they are skipped, and when no sequence
    is left.
    """
    entries = cached_sources(
        spec,
        tokenizer,
        options,
        (cache_dir if cache_dir is not None else cache_root()) / "tokenized",
        [options.max_length, options.truncate, options.train_on],
        read=read_store,
        write=_write,
    )
    sources = []
    for entry in entries:
        report = Report(**entry.stored.meta["report"])
        index = np.arange(report.sequences, dtype=np.int64)
        sources.append(TokenizedSource(entry.stored, index, entry.weight, report))
    check_sources(sources, [entry.folder for entry in entries], options.on_bad_row, rejected_path)
    return TokenizedData(tuple(sources))


Stored = TypeVar("Stored")


@dataclasses.dataclass(frozen=True)
class CacheEntry(Generic[Stored]):
    """One source of a mixture in the cache: what is stored, its folder, and its weight."""

    stored: Stored
    folder: pathlib.Path
    weight: float


def cached_sources(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    root: pathlib.Path,
    key_options: list[Any],
    *,
    read: Callable[[pathlib.Path], Stored | None],
    write: Callable[[pathlib.Path, SourceRows, PreTrainedTokenizerBase, TokenizeOptions], None],
) -> list[CacheEntry[Stored]]:
    """Every source of `spec` from the cache, where `write` makes what `read` does not find.

    Raises:
      InputError: data that are missing or empty, or a folder that cannot be read back.
    """
    options = options.at_one_time()
    tokenizer_key = tokenizer_fingerprint(tokenizer, options.chat)
    entries = []
    for source, weight in weighted_sources(spec):
        rows = SourceRows(source, options.columns)
        folder = root / cache_key(rows, tokenizer_key, key_options)
        stored = read(folder)
        if stored is None:
            with publish(folder, read=read) as scratch:
                write(scratch, rows, tokenizer, options)
            stored = read(folder)
        if stored is None:
            raise InputError(f"the tokenized data in {folder} cannot be read back; delete it and try again")
        entries.append(CacheEntry(stored, folder, weight))
    return entries


def _write(
    folder: pathlib.Path, rows: SourceRows, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions
) -> None:
    """Reads, converts, encodes and truncates every row, a chunk at a time."""
    counts = dict.fromkeys(
        (
            "rows",
            "sequences",
            "bad",
            "duplicates",
            "truncated",
            "dropped",
            "repeated",
            "untrained_turns",
            "plain",
        ),
        0,
    )
    unused: collections.Counter[str] = collections.Counter()
    tokens = trained = 0
    files: dict[str, int] = {}
    seen: set[bytes] = set()
    with (
        ParallelEncoder(tokenizer, train_on=options.train_on, chat=options.chat) as encoder,
        StoreWriter(folder) as writer,
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        for chunk in in_chunks(rows, progress=options.progress):
            kept: list[tuple[Row, Encoded]] = []
            for row, encoded_row in _encode(chunk, encoder, options, seen, counts, unused):
                result = _truncate(encoded_row, options, counts)
                if isinstance(result, RowError):
                    counts["bad"] += 1
                    rejected.write(rejection(row, result) + "\n")
                elif result is not None:
                    kept.append((row, result))
            writer.append(
                [encoded.tokens for _, encoded in kept],
                [encoded.loss_mask for _, encoded in kept],
                [files.setdefault(row.source, len(files)) for row, _ in kept],
                [row.line for row, _ in kept],
            )
            counts["sequences"] += len(kept)
            counts["untrained_turns"] += sum(encoded.untrained_turns for _, encoded in kept)
            tokens += sum(len(encoded.tokens) for _, encoded in kept)
            trained += sum(int(encoded.loss_mask.sum()) for _, encoded in kept)
    report = Report(source=rows.source, tokens=tokens, trained_tokens=trained, unused=dict(unused), **counts)
    meta = {"files": list(files), "report": dataclasses.asdict(report), "sha256": writer.sha256()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def in_chunks(rows: SourceRows, *, progress: bool) -> Iterator[list[Row]]:
    """The rows, some at a time, in order; with a bar on stderr where it takes more than some seconds."""
    chunk: list[Row] = []
    bar = tqdm(
        rows.read(),
        desc=f"tokenizing {pathlib.Path(rows.source).name}",
        total=rows.count() if progress else None,
        unit=" rows",
        delay=_SILENT_SECONDS,
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    for row in bar:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _encode(
    chunk: Sequence[Row],
    encoder: ParallelEncoder,
    options: TokenizeOptions,
    seen: set[bytes],
    counts: dict[str, int],
    unused: collections.Counter[str],
) -> list[tuple[Row, Encoded | RowError]]:
    """Each row with its sequence or what is wrong with it, in order."""
    results: list[Encoded | RowError | None] = []
    conversations = []
    for row in chunk:
        counts["rows"] += 1
        try:
            conversation = to_conversation(row.columns(), text_as=options.chat.text_as)
            conversations.append(conversation)
            results.append(None)
            counts["repeated"] += conversation.repeated
            counts["plain"] += encoder.has_template and conversation.prompt is not None
            unused.update(conversation.unused)
            digest = hashlib.blake2b(canonical(row.value).encode(), digest_size=16).digest()
            counts["duplicates"] += digest in seen
            seen.add(digest)
        except RowError as error:
            results.append(error)
    encoded = iter(encoder.encode(conversations))
    return [
        (row, next(encoded) if result is None else result) for row, result in zip(chunk, results, strict=True)
    ]


def _truncate(
    encoded: Encoded | RowError, options: TokenizeOptions, counts: dict[str, int]
) -> Encoded | RowError | None:
    """What is left of a sequence under the truncation policy; None when it is dropped."""
    if isinstance(encoded, RowError):
        return encoded
    limit, length = options.max_length, len(encoded.tokens)
    if limit and length > limit:
        if options.truncate == "error":
            return RowError(
                "(row)",
                f"has {length} tokens, more than data.max_length={limit}; raise that, or set data.truncate to "
                "right or drop",
            )
        if options.truncate == "drop":
            counts["dropped"] += 1
            return None
        encoded = Encoded(encoded.tokens[:limit], encoded.loss_mask[:limit], encoded.untrained_turns)
    if not encoded.loss_mask.any():
        counts["dropped"] += 1
        return None
    counts["truncated"] += length > len(encoded.tokens)
    return encoded
