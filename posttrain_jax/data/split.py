"""Held-out rows taken from the training data: `data.eval = "split:0.05"` (a share) or `"split:200"` (a number).

Sequences are drawn before packing, by a hash of their tokens and mask with the seed as its key. So the choice does
not depend on their order, and equal sequences, in whatever file, are on the same side. Preferences are drawn by their
prompt: all comparisons, ratings and labels of one prompt are on the same side.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from typing import TypeVar

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.preference_groups import PreferenceData, PreferenceSource
from posttrain_jax.data.prompts import PromptData, PromptRows
from posttrain_jax.data.rows import one_line
from posttrain_jax.data.tokenized import TokenizedData, TokenizedSource

PREFIX = "split:"
Data = TypeVar("Data", TokenizedData, PreferenceData, PromptData)


def split_amount(eval_spec: object) -> float | None:
    """The amount in "split:AMOUNT" (a share below 1, else a number of rows); None for any other spec."""
    if not (isinstance(eval_spec, str) and eval_spec.startswith(PREFIX)):
        return None
    try:
        amount = float(eval_spec.removeprefix(PREFIX))
    except ValueError:
        amount = 0.0
    if not (0 < amount < 1 or (1 <= amount < math.inf and amount == int(amount))):
        raise InputError(
            f"data.eval={one_line(repr(eval_spec), 200)} must be split: and a share below 1 or a whole number of rows"
        )
    return amount


def hold_out(data: Data, amount: float, *, seed: int) -> tuple[Data, Data]:
    """Splits off a share (`amount` < 1) or a number of the sequences or preferences: (the rest, held out).

    Raises InputError when nothing would be held out, or nothing would be left of a source.
    """
    groups: dict[bytes, list[tuple[int, int]]] = collections.defaultdict(list)
    for number, source in enumerate(data.sources):
        for i in range(len(source)):
            digest = hashlib.blake2b(source.identity(i), digest_size=16, key=str(seed).encode()).digest()
            groups[digest].append((number, i))
    target = round(amount * len(data)) if amount < 1 else int(amount)
    held = [np.zeros(len(source), bool) for source in data.sources]
    taken = 0
    for digest in sorted(groups):
        members = groups[digest]
        if taken + len(members) <= target:  # a group of duplicates that is too large stays in training
            taken += len(members)
            for number, i in members:
                held[number][i] = True
    if not taken:
        raise InputError(
            f"data.eval={PREFIX}{amount:g} holds out none of the {len(data):,} sequences; ask for more"
        )
    for source, chosen in zip(data.sources, held, strict=True):
        if chosen.all():
            raise InputError(
                f"data.eval={PREFIX}{amount:g} would hold out all {len(source):,} sequences or prompts of "
                f"{source.report.source}; set a smaller part, such as data.eval={PREFIX}0.1, a file of its own, or "
                'data.eval="" for no evaluation'
            )
    pairs = list(zip(data.sources, held, strict=True))
    train = tuple(source.select(np.flatnonzero(~chosen)) for source, chosen in pairs)
    test = tuple(source.select(np.flatnonzero(chosen)) for source, chosen in pairs if chosen.any())
    return dataclasses.replace(data, sources=train), dataclasses.replace(data, sources=test)


def trained_rows(train: Data, held_out: Data) -> int:
    """How many rows of a `data.eval` of its own are training rows too: the same prompt with the same completions."""
    held_contents = [_content(source, i) for source in held_out.sources for i in range(len(source))]
    held = set(held_contents)
    trained = {
        content
        for source in train.sources
        for i in range(len(source))
        if (content := _content(source, i)) in held
    }
    return sum(content in trained for content in held_contents)


def _content(source: TokenizedSource | PreferenceSource | PromptRows, i: int) -> bytes:
    """The digest of all tokens of a row, its completions in any order."""
    if isinstance(source, PreferenceSource):
        parts = sorted(source.completion_tokens(i))
    else:
        parts = [source.identity(i)]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
