"""One conversation, token by token: the KV cache is kept from turn to turn, and only new tokens are prefilled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.memory_maps import make_room
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.kv_cache import init_cache
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import Sampling, SamplingRows, StaticSamplingOptions, choose, sample_keys
from posttrain_jax.sampling.requests import check_prompt
from posttrain_jax.sampling.shapes import bucket
from posttrain_jax.sampling.slots import decode_params

PREFILL_TOKENS = 64
SMALLEST_CACHE = 512  # so that a conversation that grows needs few programs


class Stream:
    """Completes prompts one token at a time, on one device.

    A prompt that starts with what the cache already holds costs only its new tokens, which are prefilled PREFILL_TOKENS
    at a time. The cache grows by whole buckets; after it has grown the whole conversation is prefilled again.
    """

    def __init__(self, model: Model, params: PyTree, *, stop_token_ids: Sequence[int], seed: int = 0) -> None:
        self._model = model
        self._params = decode_params(model, params)
        self._stops = frozenset(stop_token_ids)
        self._seed = seed
        self._turn = 0
        self._cached: list[int] = []  # the tokens that the cache holds
        self._cache: PyTree | None = None

    def complete(self, prompt: np.ndarray, *, max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """Yields the completion's tokens, a stop token last if there was one; the caller may leave at any token.

        Raises:
          InputError: an empty prompt, one that fills the model's context, or a token id out of range.
        """
        prompt = np.asarray(prompt)
        check_prompt(self._model, prompt, "the conversation", max_new_tokens)
        make_room()
        limit = min(max_new_tokens, self._model.config.max_length - len(prompt))
        key_B = sample_keys(self._seed, jnp.asarray([self._turn]), jnp.asarray([0]))
        rows, static_options = SamplingRows.of([sampling]), StaticSamplingOptions.of(sampling)
        self._turn += 1
        if limit <= 0:
            return
        logits_BV = self._prefill_prompt([int(token) for token in prompt], limit)
        for index in range(limit):
            token_B = _draw(
                logits_BV, key_B, np.asarray([index], np.int32), rows, static_options=static_options
            )
            token = int(token_B[0])
            if token in self._stops or index + 1 == limit:
                yield token
                return
            # The next step runs on the device while the caller shows this token.
            logits_BV = self._append(token_B[:, None], 1)
            self._cached.append(token)
            yield token

    def _prefill_prompt(self, prompt: list[int], limit: int) -> Array:
        """Makes the cache hold exactly `prompt`; returns the logits of the next token."""
        capacity = bucket(len(prompt) + limit, SMALLEST_CACHE)
        keep = next(  # how many tokens the cache and the prompt share
            (i for i, (old, new) in enumerate(zip(self._cached, prompt, strict=False)) if old != new),
            min(len(self._cached), len(prompt)),
        )
        keep = min(keep, len(prompt) - 1)  # the last token is read again, for its logits
        if self._cache is None or self._cache["positions"].shape[1] < capacity:
            self._cache, keep = init_cache(self._model.config, 1, capacity, self._model.dtype), 0
        self._cache = _forget(self._cache, np.int32(keep))
        self._cached = list(prompt)
        for first in range(keep, len(prompt), PREFILL_TOKENS):
            new = prompt[first : first + PREFILL_TOKENS]
            tokens_BT = np.zeros((1, PREFILL_TOKENS), np.int32)
            tokens_BT[0, : len(new)] = new
            logits_BV = self._append(tokens_BT, len(new))
        return logits_BV

    def _append(self, tokens_BT: Array | np.ndarray, count: int) -> Array:
        self._cache, logits_BV = _extend(
            self._params, self._cache, tokens_BT, np.int32(count), model=self._model
        )
        return logits_BV


@functools.partial(jax.jit, donate_argnames="cache")
def _forget(cache: PyTree, keep: Array) -> PyTree:
    """Forgets what the cache holds beyond its first `keep` tokens."""
    forgotten_1S = jnp.arange(cache["positions"].shape[1])[None, :] >= keep
    return {
        **cache,
        "positions": jnp.where(forgotten_1S, -1, cache["positions"]),
        "length": jnp.full_like(cache["length"], keep),
    }


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _extend(
    params: PyTree, cache: PyTree, tokens_BT: Array, count: Array, *, model: Model
) -> tuple[PyTree, Array]:
    """Appends the first `count` tokens; returns the cache and the logits `[B, V]` after the last of them."""
    real_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None] < count, tokens_BT.shape)
    output = model.apply(
        params, tokens_BT, segment_ids_BT=real_BT.astype(jnp.int32), cache=cache, logits=False
    )
    hidden_BD = jax.lax.dynamic_index_in_dim(output.hidden_BTD, count - 1, axis=1, keepdims=False)
    return output.cache, model.logits(params, hidden_BD)


@functools.partial(jax.jit, static_argnames="static_options")
def _draw(
    logits_BV: Array,
    key_B: Array,
    index_B: Array,
    rows: SamplingRows,
    *,
    static_options: StaticSamplingOptions,
) -> Array:
    return choose(logits_BV, logits_BV, key_B, index_B, rows, static_options).token_B
