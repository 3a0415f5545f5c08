"""The few sizes that prompts, completions and their rows are rounded up to, so that few programs are compiled."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from posttrain_jax.core.types import PyTree

SMALLEST_BUCKET = 16
PREFILL_CHUNKS = (256, 128, 32)
CALL_TOKENS = 22  # fixed cost of a chunk, in tokens (SmolLM2-135M on 2 cores: 27 ms + 1.2 ms a token)


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128 ...: at most a half more than asked for."""
    power = max(smallest, 1 << max(size - 1, 0).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > smallest else power


def next_chunk(tokens: int) -> int:
    """How many tokens to prefill next of a prompt with so many left: the first of those PREFILL_CHUNKS that take the
    least time together. The last may be longer than what is left, but it crosses no multiple of the longest chunk."""
    if tokens >= PREFILL_CHUNKS[0]:
        return PREFILL_CHUNKS[0]
    return min(PREFILL_CHUNKS, key=lambda chunk: chunk + CALL_TOKENS + _prefill_time(tokens - chunk))


@functools.cache
def _prefill_time(tokens: int) -> int:
    """The time for so many tokens, in tokens."""
    if tokens <= 0:
        return 0
    return min(chunk + CALL_TOKENS + _prefill_time(tokens - chunk) for chunk in PREFILL_CHUNKS)


def max_length_for(prompts: Sequence[np.ndarray], max_new_tokens: int) -> int:
    """Tokens of the longest prompt and its completion, rounded up to few sizes."""
    return bucket(max((len(prompt) for prompt in prompts), default=1) + max_new_tokens, smallest=64)


def mesh_of(params: PyTree) -> Mesh | None:
    """The mesh that the parameters lie on, or None when it is a single device."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    assert isinstance(sharding.mesh, Mesh)  # of an array that exists
    return sharding.mesh
