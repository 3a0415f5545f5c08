"""KTO's reference point needs completions of other prompts: each labeled group gets the completion of another prompt.

The pairing is drawn once, by seed, so that the reference's log-probabilities of the mismatched completions can be kept
on disk like the others. (HALOs and TRL pair each row with the next of its batch, which may have the same prompt.)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.preference_groups import NO_LABEL, PreferenceData, PreferenceSource


def with_mismatched(data: PreferenceData, *, seed: int, max_length: int) -> PreferenceData:
    """Every group with a second completion, another group's, which has no label.

    Args:
      data: groups of one labeled completion each.
      seed: of the pairing.
      max_length: a prompt with a mismatched completion is cut to it; 0 = not.

    Raises:
      InputError: a source has completions of one prompt only, or groups that are not one labeled completion.
    """
    return PreferenceData(tuple(_pair_up(source, seed, max_length) for source in data.sources))


def _pair_up(source: PreferenceSource, seed: int, max_length: int) -> PreferenceSource:
    count = len(source)
    groups = [source.group(i) for i in range(count)]
    if any(len(group.sequences) != 1 or group.labels[0] == NO_LABEL for group in groups):
        raise InputError(
            f"{source.report.source} holds rows without a label; KTO takes prompt + completion + label (true, false)."
        )
    prompts = [source.identity(i) for i in range(count)]
    if len(set(prompts)) < 2:
        raise InputError(
            f"{source.report.source} holds (or has left, after the split) completions of one prompt only; KTO's "
            "reference point is made of completions of other prompts, so it needs at least two prompts."
        )
    partner = _partners(prompts, seed)
    tokens, masks, shared = [], [], []
    for i, group in enumerate(groups):
        own, other = group.sequences[0], groups[partner[i]].sequences[0]
        prompt, start = int(np.argmax(own.loss_mask)), int(np.argmax(other.loss_mask))
        mixed = np.concatenate([own.tokens[:prompt], other.tokens[start:]])
        mask = np.concatenate([own.loss_mask[:prompt], other.loss_mask[start:]])
        limit = max(max_length, prompt + 1) if max_length else len(mixed)
        tokens += [own.tokens, mixed[:limit]]
        masks += [own.loss_mask, mask[:limit]]
        shared.append(max(prompt - 1, 0))
    first = source.arrays.starts[source.index]
    store = dataclasses.replace(
        source.store,
        tokens=np.concatenate(tokens),
        loss_mask=np.concatenate(masks),
        offsets=np.cumsum([0, *(len(part) for part in tokens)], dtype=np.int64),
        files=np.repeat(source.store.files[first], 2),
        lines=np.repeat(source.store.lines[first], 2),
        meta={**source.store.meta, "sha256": _digest(source, partner, max_length)},
    )
    labels = np.full(2 * count, NO_LABEL, np.int8)
    labels[::2] = [group.labels[0] for group in groups]
    nothing = np.full(2 * count, np.nan, np.float32)
    arrays = dataclasses.replace(
        source.arrays,
        starts=np.arange(0, 2 * count + 1, 2, dtype=np.int64),
        shared=np.asarray(shared, np.int32),
        comparison_starts=np.zeros(count + 1, np.int64),
        ranks=np.zeros(2 * count, np.int32),
        ratings=nothing,
        labels=labels,
        rater_scores=nothing[:, None][:, :0],
    )
    return dataclasses.replace(source, store=store, arrays=arrays, index=np.arange(count, dtype=np.int64))


def _partners(prompts: Sequence[bytes], seed: int) -> np.ndarray:
    """For each group one of another prompt, int64; each group is taken once, unless one prompt has more than half.

    The groups stand in a circle in random order, those of a prompt together, and each takes the one that is as many
    places on as the largest prompt has groups; a prompt with more than half goes through the others again and again.
    """
    order = np.random.default_rng(seed).permutation(len(prompts))
    together: dict[bytes, list[int]] = {}
    for i in order.tolist():
        together.setdefault(prompts[i], []).append(i)
    circle = np.concatenate(list(together.values()))
    largest = max(len(members) for members in together.values())
    partner = np.empty(len(prompts), np.int64)
    start = 0
    for members in together.values():
        others = len(prompts) - len(members)
        positions = start + largest + np.arange(len(members)) % others
        partner[members] = circle[positions % len(prompts)]
        start += len(members)
    return partner


def _digest(source: PreferenceSource, partner: np.ndarray, max_length: int) -> str:
    digest = hashlib.sha256(f"{source.store.meta['sha256']} {max_length}".encode())
    for array in (source.index, partner):
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    return digest.hexdigest()
