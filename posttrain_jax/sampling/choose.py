"""Which token comes next: penalties, temperature, filters, and a draw whose random number depends on its sample alone.

Every option is an array with one entry a row, so that rows of one batch can be sampled in different ways. An option
that no row uses is left out of the compiled program (`StaticSamplingOptions`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import Array

DRAW_BLOCK = 128
SMALLEST = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Penalties come first, then temperature, top_k, top_p and min_p, in this order.

    With temperature 0 the likeliest token (after the penalties) is taken.

    Attributes:
      temperature: logits are divided by it; 0 = greedy.
      top_k: only the k likeliest tokens (ties with the k-th included); 0 = all.
      top_p: of those, the smallest set with at least this much probability, the likeliest first (ties with the
        last one included); 1 = all. Nucleus sampling, arXiv:1904.09751.
      min_p: of those, the tokens with at least this share of the likeliest one's probability; 0 = all.
        arXiv:2407.01082.
      repetition_penalty: logits of tokens of the prompt or the completion so far are divided by it where they are
        positive and multiplied where negative; 1 = off. CTRL, arXiv:1909.05858, section 4.1.
      presence_penalty: subtracted once from the logits of tokens that the completion holds already; 0 = off.
      frequency_penalty: subtracted as often as the completion holds the token already; 0 = off.
      bad_words: sequences of token ids that no completion may hold.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= LARGEST:
            raise InputError(
                f"temperature is {self.temperature:g}; it must be 0 (greedy) or a positive number that float32 holds."
            )
        if not 0 <= self.top_k < 2**31:
            raise InputError(
                f"top_k is {self.top_k}; it must be 0 (off) or a positive number of tokens below 2^31."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p:g}; it must lie above 0 and at most at 1 (off).")
        if not 0.0 <= self.min_p <= 1.0:
            raise InputError(f"min_p is {self.min_p:g}; it must lie between 0 (off) and 1.")
        if not SMALLEST <= self.repetition_penalty <= LARGEST:
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty:g}; it must be a positive number that float32 holds "
                "(1 = off)."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(vars(self)[name]) <= LARGEST:
                raise InputError(
                    f"{name} is {vars(self)[name]:g}; it must be a number that float32 holds (0 = off)."
                )
        if any(len(word) == 0 for word in self.bad_words):
            raise InputError("bad_words holds an empty sequence, which every completion would hold.")


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """`Sampling`'s numbers, one entry a row (`bad_words` are in `StaticSamplingOptions`)."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    repetition_penalty_B: Array
    presence_penalty_B: Array
    frequency_penalty_B: Array

    @staticmethod
    def of(rows: list[Sampling]) -> SamplingRows:
        """One entry for each of `rows`, as NumPy arrays (the call that takes them brings them to the device)."""

        def column(name: str, dtype: type) -> Any:
            return np.asarray([vars(row)[name] for row in rows], dtype)

        return SamplingRows(
            temperature_B=column("temperature", np.float32),
            top_k_B=column("top_k", np.int32),
            top_p_B=column("top_p", np.float32),
            min_p_B=column("min_p", np.float32),
            repetition_penalty_B=column("repetition_penalty", np.float32),
            presence_penalty_B=column("presence_penalty", np.float32),
            frequency_penalty_B=column("frequency_penalty", np.float32),
        )


@dataclasses.dataclass(frozen=True)
class StaticSamplingOptions:
    """The sampling options that a compiled program supports: static, the `union` of those of all its requests.

    Attributes:
      draw: some row has a temperature.
      nucleus: some row has top_k or top_p.
      min_p: some row has min_p.
      penalties: some row has one of the three penalties.
      bad_words: sequences that no completion of any row may hold.
      min_tokens: some row may not stop before a number of tokens.
      alternatives: how many of the likeliest tokens are reported beside each drawn one.
    """

    draw: bool = False
    nucleus: bool = False
    min_p: bool = False
    penalties: bool = False
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: bool = False
    alternatives: int = 0

    @property
    def bad_words_context(self) -> int:
        """How many tokens before the next one decide whether that would complete a bad word."""
        return max((len(word) - 1 for word in self.bad_words), default=0)

    @staticmethod
    def of(sampling: Sampling, *, min_tokens: int = 0, alternatives: int = 0) -> StaticSamplingOptions:
        """The options that this way of sampling uses."""
        draw = sampling.temperature > 0
        return StaticSamplingOptions(
            draw=draw,
            nucleus=draw and (sampling.top_k > 0 or sampling.top_p < 1.0),
            min_p=draw and sampling.min_p > 0,
            penalties=(
                sampling.repetition_penalty != 1.0
                or sampling.presence_penalty != 0.0
                or sampling.frequency_penalty != 0.0
            ),
            bad_words=tuple(sorted(set(sampling.bad_words))),
            min_tokens=min_tokens > 0,
            alternatives=alternatives,
        )

    def union(self, other: StaticSamplingOptions) -> StaticSamplingOptions:
        """The options of both. Bad words must be the same on both sides or absent."""
        return StaticSamplingOptions(
            draw=self.draw or other.draw,
            nucleus=self.nucleus or other.nucleus,
            min_p=self.min_p or other.min_p,
            penalties=self.penalties or other.penalties,
            bad_words=tuple(sorted({*self.bad_words, *other.bad_words})),
            min_tokens=self.min_tokens or other.min_tokens,
            alternatives=max(self.alternatives, other.alternatives),
        )


def sample_keys(seed: Array | int, prompt_ids_B: Array, sample_ids_B: Array) -> Array:
    """One typed key per row; the key of token t of the completion is `fold_in(key, t)`."""
    root = jax.random.key(seed)
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(root, prompt), sample))(
        prompt_ids_B, sample_ids_B
    )


def penalize(logits_BV: Array, prompt_BV: Array, counts_BV: Array, rows: SamplingRows) -> Array:
    """Repetition, presence and frequency penalties.

    `prompt_BV` says which tokens the prompt holds, `counts_BV` how often the completion holds each so far.
    """
    repetition_B1 = rows.repetition_penalty_B[:, None]
    seen_BV = prompt_BV | (counts_BV > 0)
    pulled_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(seen_BV, pulled_BV, logits_BV)
    logits_BV = logits_BV - rows.presence_penalty_B[:, None] * (counts_BV > 0)
    return logits_BV - rows.frequency_penalty_B[:, None] * counts_BV


def ban_words(logits_BV: Array, recent_BW: Array, bad_words: tuple[tuple[int, ...], ...]) -> Array:
    """Sets to -inf every token that would complete one of `bad_words`.

    `recent_BW` holds the last W tokens of the row (the latest last, -1 where there is none), W at least the
    longest word's length minus one.
    """
    width = recent_BW.shape[1]
    for word in bad_words:
        start = jnp.asarray(word[:-1], jnp.int32)
        matches_B = jnp.all(recent_BW[:, width - len(start) :] == start[None], axis=1)
        banned_B = jnp.where(matches_B, -jnp.inf, logits_BV[:, word[-1]])
        logits_BV = logits_BV.at[:, word[-1]].set(banned_B)
    return logits_BV


def keep_likeliest(logits_BV: Array, top_k_B: Array, top_p_B: Array) -> Array:
    """Logits with all but the tokens that top_k and then top_p keep set to -inf.

    Nothing is sorted (on a CPU that costs more than a decode step): each limit is the largest logit above which
    enough tokens, or enough probability, lie, and is found by bisection over the float32 numbers.
    """
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    keys_BV = _ordered(logits_BV)
    bottom_B = jnp.full(top_k_B.shape, jnp.iinfo(jnp.int32).min)

    def by_count() -> Array:
        ones_BV = jnp.ones_like(weights_BV)
        return jnp.where(top_k_B > 0, _threshold(keys_BV, ones_BV, top_k_B.astype(jnp.float32)), bottom_B)

    count_B = jax.lax.cond(jnp.any(top_k_B > 0), by_count, lambda: bottom_B)
    weights_BV = jnp.where(keys_BV >= count_B[:, None], weights_BV, 0.0)

    def by_mass() -> Array:
        mass_B = top_p_B * _sum(weights_BV)
        return jnp.where(top_p_B < 1.0, _threshold(keys_BV, weights_BV, mass_B), bottom_B)

    mass_B = jax.lax.cond(jnp.any(top_p_B < 1.0), by_mass, lambda: bottom_B)
    return jnp.where(keys_BV >= jnp.maximum(count_B, mass_B)[:, None], logits_BV, -jnp.inf)


def _ordered(values: Array) -> Array:
    """int32 keys that are ordered as the float32 values are."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def _threshold(keys_BV: Array, weights_BV: Array, target_B: Array) -> Array:
    """The largest key such that the weights of the keys at or above it add up to `target_B`; the smallest key
    where all of them do not."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the mean, without overflow
        enough_B = _sum(jnp.where(keys_BV >= middle_B[:, None], weights_BV, 0.0)) >= target_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    bounds = jnp.min(keys_BV, axis=-1), jnp.max(keys_BV, axis=-1) + 1
    return jax.lax.fori_loop(0, 32, halve, bounds)[0]


def _sum(values_BV: Array) -> Array:
    """Sum over the last axis, in lanes of DRAW_BLOCK first: so XLA's CPU backend uses vector instructions."""
    padding = -values_BV.shape[-1] % DRAW_BLOCK
    lanes = jnp.pad(values_BV, ((0, 0), (0, padding))).reshape(values_BV.shape[0], -1, DRAW_BLOCK)
    return jnp.sum(jnp.sum(lanes, axis=1), axis=-1)


def keep_min_p(logits_BV: Array, min_p_B: Array) -> Array:
    """Logits with the tokens below `min_p` times the likeliest one's probability set to -inf."""
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.where(logits_BV >= largest_B1 + jnp.log(min_p_B)[:, None], logits_BV, -jnp.inf)


def draw(logits_BV: Array, uniform_B: Array) -> Array:
    """The token at which the cumulative softmax passes `uniform_B` (in [0, 1)), int32 `[B]`.

    One random number a row, and two levels (blocks of the vocabulary, then the tokens of one block), so that no
    cumulative sum runs over the whole vocabulary. A token of probability 0 is never drawn.
    """
    batch, vocab = logits_BV.shape
    padding = -vocab % DRAW_BLOCK
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    weights_BNW = jnp.pad(weights_BV, ((0, 0), (0, padding))).reshape(batch, -1, DRAW_BLOCK)
    block_BN = jnp.sum(weights_BNW, axis=-1)
    block_B, rest_B = _first_above(block_BN, uniform_B * jnp.sum(block_BN, axis=-1))
    inside_BW = jnp.take_along_axis(weights_BNW, block_B[:, None, None], axis=1)[:, 0]
    token_B, _ = _first_above(inside_BW, rest_B)
    return (block_B * DRAW_BLOCK + token_B).astype(jnp.int32)


def _first_above(weights_BN: Array, target_B: Array) -> tuple[Array, Array]:
    """Where the cumulative sum first passes `target_B`, and what is left of it there. Rounding can leave the target
    at or past the sum; then the last entry that is not 0 is taken."""
    sums_BN = jnp.cumsum(weights_BN, axis=-1)
    indices_1N = jnp.arange(weights_BN.shape[-1])[None]
    last_B = jnp.max(jnp.where(weights_BN > 0, indices_1N, 0), axis=-1)
    above_BN = (sums_BN > target_B[:, None]) & (weights_BN > 0)
    index_B = jnp.where(jnp.any(above_BN, axis=-1), jnp.argmax(above_BN, axis=-1), last_B)
    before_BN = sums_BN - weights_BN
    left_B = target_B - jnp.take_along_axis(before_BN, index_B[:, None], axis=-1)[:, 0]
    return index_B, left_B


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """One token a row.

    Attributes:
      token_B: int32.
      logp_B: float32, its log-probability under the model itself.
      sample_logp_B: float32, its log-probability under the distribution it was drawn from (0 when greedy).
      alternatives_BK: int32, the likeliest tokens under the model, and
      alternative_logps_BK: their log-probabilities; K = `StaticSamplingOptions.alternatives`.
    """

    token_B: Array
    logp_B: Array
    sample_logp_B: Array
    alternatives_BK: Array
    alternative_logps_BK: Array


def choose(
    logits_BV: Array,
    allowed_BV: Array,
    keys_B: Array,
    index_B: Array,
    rows: SamplingRows,
    static_options: StaticSamplingOptions,
) -> Choice:
    """The next token of every row, from the model's logits and those after penalties and bans (`allowed_BV`)."""
    greedy_B = jnp.argmax(allowed_BV, axis=-1).astype(jnp.int32)
    token_B, sample_logp_B = greedy_B, jnp.zeros(greedy_B.shape, jnp.float32)
    if static_options.draw:
        draws_B = rows.temperature_B > 0
        scaled_BV = allowed_BV / jnp.where(draws_B, rows.temperature_B, 1.0)[:, None]
        if static_options.nucleus:
            scaled_BV = keep_likeliest(scaled_BV, rows.top_k_B, rows.top_p_B)
        if static_options.min_p:
            scaled_BV = keep_min_p(scaled_BV, rows.min_p_B)
        uniform_B = jax.vmap(lambda key, index: jax.random.uniform(jax.random.fold_in(key, index)))(
            keys_B, index_B
        )
        token_B = jnp.where(draws_B, draw(scaled_BV, uniform_B), greedy_B)
        sample_logp_B = jnp.where(draws_B, _logp(scaled_BV, token_B), 0.0)
    logps_BK, best_BK = jnp.zeros((*greedy_B.shape, 0)), jnp.zeros((*greedy_B.shape, 0), jnp.int32)
    if static_options.alternatives:
        logps_BK, best_BK = jax.lax.top_k(logits_BV, static_options.alternatives)
        logps_BK = logps_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    return Choice(token_B, _logp(logits_BV, token_B), sample_logp_B, best_BK, logps_BK)


def _logp(logits_BV: Array, token_B: Array) -> Array:
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
