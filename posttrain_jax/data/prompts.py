"""Prompts to answer, for algorithms that sample: rows of any source as token ids, one prompt a row.

A row is {"prompt": text}, {"messages": [...]} or {"prompt_ids": [...]}; its other columns travel with it, for a reward
function may need them (a number to find, a test to pass).
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.rows import AS_IN_THE_FILE, ColumnNames, Row, RowError
from posttrain_jax.data.sources import Spec, read_rows, weighted_sources
from posttrain_jax.data.store import canonical, rejection

# The columns of a row -> int32 ids of the prompt. Raises RowError or InputError where they are no prompt.
Encode = Callable[[dict[str, Any]], np.ndarray]
LONG_PROMPTS = ("error", "drop")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      tokens: int32 `[n]`, not empty.
      row: its columns.
      row_id: "file:line".
    """

    tokens: np.ndarray
    row: dict[str, Any]
    row_id: str


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """What became of a source's rows."""

    source: str
    prompts: int
    shortest: int
    longest: int
    dropped: int
    bad: int

    def text(self) -> str:
        """In a line."""
        line = f"{self.source}: {self.prompts:,} prompts of {self.shortest} to {self.longest} tokens"
        line += f", {self.dropped:,} dropped (too long)" if self.dropped else ""
        return line + (f", {self.bad:,} bad rows skipped" if self.bad else "")


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """One source's prompts, as the loader takes them; `number` tells the sources of a mixture apart."""

    prompts: list[Prompt]
    number: int
    weight: float
    report: PromptReport

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> tuple[int, int]:
        return self.number, row

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int64, tokens in each prompt."""
        return np.asarray([prompt.tokens.size for prompt in self.prompts], np.int64)

    def row_id(self, row: int) -> str:
        """ "file:line" of a prompt."""
        return self.prompts[row].row_id

    def identity(self, row: int) -> bytes:
        """What says which prompt it is, for splits: equal prompts are on the same side."""
        return self.prompts[row].tokens.astype(np.int32).tobytes()

    def select(self, rows: np.ndarray) -> PromptRows:
        """Some of the prompts."""
        return dataclasses.replace(self, prompts=[self.prompts[row] for row in rows.tolist()])

    def fingerprint(self) -> bytes:
        """Changes when a prompt does, or a column that travels with it."""
        digest = hashlib.sha256()
        for row, prompt in enumerate(self.prompts):
            digest.update(self.identity(row) + b"|" + canonical(prompt.row).encode() + b"|")
        return digest.digest()

    def collate(self, rows: Sequence[tuple[int, int] | None]) -> dict[str, np.ndarray]:
        """Where each prompt is found: `places` int32 `[rows, 2]`, source and row (-1, -1 = none)."""
        return {"places": np.asarray([row if row is not None else (-1, -1) for row in rows], np.int32)}


@dataclasses.dataclass(frozen=True)
class PromptData:
    """The prompts of every source of a mixture; each `number` is its place in `sources`."""

    sources: tuple[PromptRows, ...]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def at(self, place: Sequence[int]) -> Prompt:
        """The prompt at (source, row), as `PromptRows.collate` gives places."""
        number, row = place
        return self.sources[number].prompts[row]

    def all(self) -> list[Prompt]:
        """Every prompt, source after source."""
        return [prompt for source in self.sources for prompt in source.prompts]

    def text(self) -> str:
        """What there is, in a line."""
        return "; ".join(source.report.text() for source in self.sources) + "."


def read_prompts(
    spec: Spec,
    encode: Encode,
    *,
    max_tokens: int,
    long_prompts: str = "error",
    on_bad_row: str = "stop",
    columns: ColumnNames = AS_IN_THE_FILE,
    rejected_path: pathlib.Path | None = None,
) -> PromptData:
    """The prompts of every source of `spec`.

    Args:
      spec: as `data.train`.
      encode: of the columns of a row.
      max_tokens: most tokens of a prompt.
      long_prompts: "error", or "drop": a prompt that is longer is left out and counted.
      on_bad_row: "stop" or "skip".
      columns: what the rows' columns are called here, and which are left out before anything reads them.
      rejected_path: a file for the rows that are skipped, with the reason; there is none when no row is bad.

    Raises:
      InputError: a bad row (file, line, column, reason), a prompt that is too long, a source without prompts.
    """
    if long_prompts not in LONG_PROMPTS:
        raise InputError(f"data.long_prompts is {long_prompts!r}; use {' or '.join(LONG_PROMPTS)}.")
    parts = []
    rejected: list[str] = []
    for number, (source, weight) in enumerate(weighted_sources(spec)):
        prompts: list[Prompt] = []
        dropped = bad = 0
        for row in read_rows(source, columns):
            where = f"{row.source}:{row.line}"
            try:
                tokens = _encoded(row, encode)
            except (RowError, InputError) as error:
                if on_bad_row != "skip":
                    raise InputError(
                        f"{where}: {error}; correct the row, or set data.on_bad_row=skip."
                    ) from error
                bad += 1
                reason = error if isinstance(error, RowError) else RowError("(row)", str(error))
                rejected.append(rejection(row, reason) + "\n")
                continue
            if tokens.size > max_tokens:
                if long_prompts == "error":
                    raise InputError(
                        f"{where}: the prompt has {tokens.size} tokens, more than {max_tokens}; shorten it, raise "
                        "data.max_length, or set data.long_prompts=drop."
                    )
                dropped += 1
                continue
            prompts.append(Prompt(tokens, row.value, where))
        if not prompts:
            raise InputError(
                f"{source} holds no prompt of at most {max_tokens} tokens; nothing can be answered."
            )
        lengths = [prompt.tokens.size for prompt in prompts]
        report = PromptReport(
            source=pathlib.Path(source).name,
            prompts=len(prompts),
            shortest=min(lengths),
            longest=max(lengths),
            dropped=dropped,
            bad=bad,
        )
        parts.append(PromptRows(prompts, number, weight, report))
    if rejected_path is not None:
        rejected_path.unlink(missing_ok=True)
        if rejected:
            rejected_path.write_text("".join(rejected), "utf-8")
    return PromptData(tuple(parts))


def _encoded(row: Row, encode: Encode) -> np.ndarray:
    tokens = encode(row.columns())
    if tokens.ndim != 1 or tokens.size == 0:
        raise RowError("prompt", "has no tokens; a model needs at least one to go on from")
    return tokens
