"""One conversation, token by token: the KV cache is kept from turn to turn, and only new tokens are read."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.models.transformer import Model, init_cache
from posttrain_jax.sampling.choose import Sampling, sample_keys
from posttrain_jax.sampling.generate import bucket, check_prompt, decode_step, next_token, prefill
from posttrain_jax.types import Array, PyTree


class Stream:
    """Answers prompts one token at a time, on one device.

    A prompt that starts with what the cache already holds costs only its new tokens. The cache grows by whole
    buckets; growing reads the conversation anew.
    """

    def __init__(self, model: Model, params: PyTree, *, stop_token_ids: Sequence[int], seed: int = 0) -> None:
        self._model = model
        self._params = params
        self._stops = frozenset(stop_token_ids)
        self._seed = seed
        self._turn = 0
        self._read: list[int] = []
        self._cache: dict[str, Array] | None = None

    def answer(self, prompt: np.ndarray, *, max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """Yields the answer's tokens, a stop token last if there was one; the caller may leave at any token.

        Raises:
          InputError: an empty prompt, one that fills the model's context, or a token id out of range.
        """
        prompt = np.asarray(prompt)
        check_prompt(self._model, prompt, "the conversation", max_new_tokens)
        limit = min(max_new_tokens, self._model.config.max_length - len(prompt))
        key = sample_keys(self._seed, jnp.asarray([self._turn]), jnp.asarray([0]))
        self._turn += 1
        if limit <= 0:
            return
        logits_BV = self._read_prompt([int(token) for token in prompt], limit)
        for place in range(limit):
            token_B = _draw(logits_BV, key, np.int32(place), sampling=sampling)
            token = int(token_B[0])
            if token in self._stops or place + 1 == limit:
                yield token
                return
            # The next step runs on the device while the caller shows this token.
            logits_BV = self._step(token_B)
            self._read.append(token)
            yield token

    def _read_prompt(self, prompt: list[int], limit: int) -> Array:
        """Brings the cache to hold exactly `prompt`; the logits of what follows."""
        capacity = bucket(len(prompt) + limit)
        keep = next(
            (i for i, (old, new) in enumerate(zip(self._read, prompt, strict=False)) if old != new),
            min(len(self._read), len(prompt)),
        )
        keep = min(keep, len(prompt) - 1)  # the last token is read again: its logits are what is wanted
        cache = self._cache
        if cache is None or cache["positions"].shape[1] < capacity:
            cache, keep = init_cache(self._model.config, 1, capacity, self._model.dtype), 0
        new = prompt[keep:]
        tokens_BT = np.zeros((1, bucket(len(new))), np.int32)
        tokens_BT[0, : len(new)] = new
        self._cache, logits_BV = _resume(
            self._params,
            cache,
            np.int32(keep),
            tokens_BT,
            np.asarray([len(new)], np.int32),
            model=self._model,
        )
        self._read = list(prompt)
        return logits_BV

    def _step(self, token_B: Array) -> Array:
        self._cache, logits_BV = _step(self._params, self._cache, token_B, model=self._model)
        return logits_BV


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _resume(
    params: PyTree, cache: dict[str, Array], keep: Array, tokens_BT: Array, lengths_B: Array, *, model: Model
) -> tuple[dict[str, Array], Array]:
    """Forgets what the cache holds beyond its first `keep` tokens and appends the new ones."""
    forgotten_1S = jnp.arange(cache["positions"].shape[1])[None, :] >= keep
    cache = {
        **cache,
        "positions": jnp.where(forgotten_1S, -1, cache["positions"]),
        "length": jnp.full_like(cache["length"], keep),
    }
    return prefill(model, params, cache, tokens_BT, lengths_B)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _step(
    params: PyTree, cache: dict[str, Array], token_B: Array, *, model: Model
) -> tuple[dict[str, Array], Array]:
    return decode_step(model, params, cache, token_B, jnp.ones_like(token_B, bool))


@functools.partial(jax.jit, static_argnames="sampling")
def _draw(logits_BV: Array, key: Array, place: Array, *, sampling: Sampling) -> Array:
    no_stops_V = jnp.zeros(logits_BV.shape[-1], bool)
    return next_token(logits_BV, key, place, no_stops_V, min_new_tokens=0, sampling=sampling)[0]
