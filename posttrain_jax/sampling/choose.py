"""Which token comes next: temperature, top-k, top-p, and random numbers that belong to one sample alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from posttrain_jax.errors import InputError
from posttrain_jax.types import Array

NUCLEUS_HEAD = 1024


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. With temperature 0 the likeliest token is taken and the rest is not used.

    Attributes:
      temperature: logits are divided by it before anything else; 0 = greedy.
      top_k: only the k likeliest tokens (ties with the k-th included); 0 = all.
      top_p: of those, the smallest set with at least this much probability, the likeliest first (ties with the
        last one included); 1 = all. Nucleus sampling, arXiv:1904.09751.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature is {self.temperature:g}; it must be 0 (greedy) or a positive number."
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (off) or a positive number of tokens.")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p:g}; it must lie above 0 and at most at 1 (off).")


def sample_keys(seed: Array | int, prompt_ids_B: Array, sample_ids_B: Array) -> Array:
    """One typed key per row; the key of the token at place t of the answer is `fold_in(key, t)`."""
    root = jax.random.key(seed)
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(root, prompt), sample))(
        prompt_ids_B, sample_ids_B
    )


def keep_likeliest(logits_BV: Array, top_k: int, top_p: float) -> Array:
    """Logits with all but the tokens that `top_k` and then `top_p` keep set to -inf."""
    vocab = logits_BV.shape[-1]
    if 0 < top_k < vocab:
        best_BK = jax.lax.top_k(logits_BV, top_k)[0]
        floor_B1 = best_BK[:, -1:]
        if top_p < 1.0:
            floor_B1 = _nucleus_floor(best_BK, best_BK, top_p)
    elif top_p < 1.0:
        floor_B1 = _nucleus_floor_of_all(logits_BV, top_p)
    else:
        return logits_BV
    return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)


def _nucleus_floor(best_BK: Array, all_BN: Array, top_p: float) -> Array:
    """The lowest logit of the nucleus, `[B, 1]`; `best_BK` falls along its last axis, `all_BN` normalises."""
    weights_BK = jnp.exp(best_BK - jax.nn.logsumexp(all_BN, axis=-1, keepdims=True))
    before_BK = jnp.cumsum(weights_BK, axis=-1) - weights_BK
    # The first one is always in it: nothing stands before it.
    return jnp.min(jnp.where(before_BK < top_p, best_BK, jnp.inf), axis=-1, keepdims=True)


def _nucleus_floor_of_all(logits_BV: Array, top_p: float) -> Array:
    """`_nucleus_floor` over the vocabulary. Sorting it costs more than a decode step, so first look at the head."""
    few_BK = jax.lax.top_k(logits_BV, min(NUCLEUS_HEAD, logits_BV.shape[-1]))[0]
    mass_B1 = jnp.sum(
        jnp.exp(few_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)), axis=-1, keepdims=True
    )
    return jax.lax.cond(
        jnp.all(mass_B1 >= top_p),
        lambda: _nucleus_floor(few_BK, logits_BV, top_p),
        lambda: _nucleus_floor(-jnp.sort(-logits_BV, axis=-1), logits_BV, top_p),
    )


def choose(logits_BV: Array, keys_B: Array, sampling: Sampling) -> Array:
    """A token id for every row, int32 `[B]`: argmax, or a draw by the Gumbel-max trick with the row's own key."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = keep_likeliest(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)
