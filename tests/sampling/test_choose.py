"""Sampling filters on literal logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.sampling.choose import (
    DRAW_BLOCK,
    Sampling,
    SamplingRows,
    StaticSamplingOptions,
    ban_words,
    choose,
    draw,
    keep_likeliest,
    keep_min_p,
    penalize,
    sample_keys,
)

# Probabilities 0.5, 0.25, 0.15, 0.1 at the places 2, 0, 3, 1.
LOGITS = jnp.log(jnp.asarray([[0.25, 0.1, 0.5, 0.15]]))


def kept(top_k: int, top_p: float, logits=LOGITS) -> list[int]:
    limited = keep_likeliest(logits, jnp.asarray([top_k]), jnp.asarray([top_p]))
    return np.flatnonzero(np.isfinite(np.asarray(limited)[0])).tolist()


def choose_rows(logits, keys, sampling: Sampling, place: int = 0):
    """One token a row, all rows drawn alike."""
    rows = len(keys)
    place_B = jnp.full(rows, place, jnp.int32)
    return choose(
        logits, logits, keys, place_B, SamplingRows.of([sampling] * rows), StaticSamplingOptions.of(sampling)
    )


def test_top_k_keeps_the_k_likeliest():
    assert kept(1, 1.0) == [2]
    assert kept(3, 1.0) == [0, 2, 3]
    assert kept(0, 1.0) == kept(4, 1.0) == kept(99, 1.0) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_with_that_much_probability():
    assert kept(0, 0.3) == [2]
    assert kept(0, 0.6) == [0, 2]  # 0.5 is not enough, 0.75 is
    assert kept(0, 0.8) == [0, 2, 3]
    assert kept(0, 0.95) == [0, 1, 2, 3]
    assert kept(0, 1e-6) == [2]  # one token always stays


def test_top_p_counts_among_what_top_k_left():
    # Of the two likeliest, the first holds 2/3: enough for 0.6, not for 0.7.
    assert kept(2, 0.6) == [2]
    assert kept(2, 0.7) == [0, 2]


def test_min_p_keeps_what_has_its_share_of_the_likeliest():
    def kept_by(min_p: float) -> list[int]:
        return np.flatnonzero(np.isfinite(np.asarray(keep_min_p(LOGITS, jnp.asarray([min_p])))[0])).tolist()

    assert kept_by(0.0) == [0, 1, 2, 3]
    assert kept_by(0.25) == [0, 2, 3]  # 0.125 of 0.5
    assert kept_by(0.4) == [0, 2]
    assert kept_by(1.0) == [2]


def test_rows_of_one_batch_are_filtered_each_in_its_own_way():
    logits = jnp.broadcast_to(LOGITS, (4, 4))
    limited = keep_likeliest(logits, jnp.asarray([1, 0, 0, 2]), jnp.asarray([1.0, 0.8, 1.0, 0.6]))
    counts = np.isfinite(np.asarray(limited)).sum(axis=1)
    assert counts.tolist() == [1, 3, 4, 1]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (20, 1.0), (20, 0.8), (300, 0.999), (1, 0.5)])
def test_filters_keep_what_sorting_keeps(top_k, top_p):
    """Against a sort in NumPy, on logits of both signs with ties and tokens of probability 0."""
    logits = np.random.default_rng(1).normal(scale=3, size=(3, 300)).astype(np.float32)
    logits[:, 50:60], logits[:, 7] = -np.inf, logits[:, 8]
    limited = keep_likeliest(jnp.asarray(logits), jnp.full(3, top_k), jnp.full(3, top_p))
    for row, got in zip(logits, np.asarray(limited), strict=True):
        falling = np.sort(row)[::-1].astype(np.float64)[: top_k or None]
        shares = np.exp(falling) / np.exp(falling).sum()
        lowest = falling[int(np.searchsorted(np.cumsum(shares), top_p))] if top_p < 1 else falling[-1]
        np.testing.assert_array_equal(
            np.flatnonzero(got > -np.inf), np.flatnonzero((row >= lowest) & (row > -np.inf))
        )


def test_penalties_by_hand():
    """Repetition sees prompt and answer, the other two the answer alone."""
    logits = jnp.asarray([[2.0, -2.0, 1.0, 0.5]])
    prompt = jnp.asarray([[True, False, False, False]])
    counts = jnp.asarray([[0, 3, 0, 1]])
    rows = SamplingRows.of([Sampling(repetition_penalty=2.0, presence_penalty=0.1, frequency_penalty=0.5)])
    got = penalize(logits, prompt, counts, rows)
    np.testing.assert_allclose(got, [[1.0, -4.0 - 0.1 - 1.5, 1.0, 0.25 - 0.1 - 0.5]], rtol=1e-6)


def test_bad_words_are_banned_only_where_they_would_be_complete():
    logits = jnp.zeros((3, 6))
    recent = jnp.asarray([[1, 2], [2, 1], [-1, -1]])
    banned = np.isinf(np.asarray(ban_words(logits, recent, ((5,), (2, 3), (1, 2, 4)))))
    assert [np.flatnonzero(row).tolist() for row in banned] == [[3, 4, 5], [5], [5]]


def test_draws_follow_the_softmax_of_logits_over_temperature():
    """0.5^2 : 0.25^2 : 0.15^2 : 0.1^2 over their sum 0.345 at temperature 1/2."""
    keys = sample_keys(7, jnp.arange(4000), jnp.zeros(4000, jnp.int32))
    logits = jnp.broadcast_to(LOGITS, (4000, 4))
    shares = np.asarray([0.0625, 0.01, 0.25, 0.0225]) / 0.345
    choice = choose_rows(logits, keys, Sampling(0.5))
    drawn = np.bincount(np.asarray(choice.token_B), minlength=4) / 4000
    np.testing.assert_allclose(drawn, shares, atol=0.03)
    # Of each token, its log-probability under the model and under what it was drawn from.
    np.testing.assert_allclose(choice.sample_logp_B, np.log(shares)[choice.token_B], atol=1e-5)
    np.testing.assert_allclose(choice.logp_B, np.asarray(LOGITS)[0][choice.token_B], atol=1e-5)
    greedy = choose_rows(logits, keys, Sampling(0.0))
    assert (np.asarray(greedy.token_B) == 2).all() and not np.asarray(greedy.sample_logp_B).any()


def test_a_draw_over_many_blocks_is_the_inverse_of_the_cumulative_sum():
    """Also with a vocabulary that no block divides, and weights of 0 at both ends."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 5 * DRAW_BLOCK + 17)).astype(np.float32)
    logits[:, :3] = logits[:, -3:] = -np.inf
    uniform = rng.random(64).astype(np.float32)
    uniform[:2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    weights = np.exp(logits.astype(np.float64))
    sums = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
    tokens = np.asarray(draw(jnp.asarray(logits), jnp.asarray(uniform)))
    chosen = np.take_along_axis(sums, tokens[:, None], axis=1)[:, 0]
    before = np.take_along_axis(sums, tokens[:, None] - 1, axis=1)[:, 0]
    assert (chosen >= uniform - 1e-5).all() and (before <= uniform + 1e-5).all()
    assert tokens.min() >= 3 and tokens.max() < logits.shape[1] - 3


def test_alternatives_are_the_likeliest_under_the_model():
    keys = sample_keys(0, jnp.arange(1), jnp.arange(1))
    static_options = dataclasses.replace(StaticSamplingOptions.of(Sampling(1.0)), alternatives=3)
    rows = SamplingRows.of([Sampling(1.0)])
    choice = choose(LOGITS, LOGITS, keys, jnp.zeros(1, jnp.int32), rows, static_options)
    assert np.asarray(choice.alternatives_BK).tolist() == [[2, 0, 3]]
    np.testing.assert_allclose(np.exp(choice.alternative_logps_BK), [[0.5, 0.25, 0.15]], rtol=1e-5)


def test_every_prompt_sample_and_place_has_its_own_random_number():
    keys = sample_keys(0, jnp.asarray([0, 0, 1, 1]), jnp.asarray([0, 1, 0, 1]))
    assert len({tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()}) == 4
    flat = jnp.zeros((4, 4096))
    first, second = (choose_rows(flat, keys, Sampling(1.0), place).token_B for place in (0, 1))
    assert len({*np.asarray(first).tolist(), *np.asarray(second).tolist()}) == 8


def test_needs_cover_what_they_were_made_of():
    nucleus = StaticSamplingOptions.of(Sampling(0.7, top_p=0.9))
    assert nucleus == StaticSamplingOptions(draw=True, nucleus=True)
    assert (
        StaticSamplingOptions.of(Sampling(0.0, top_p=0.9)) == StaticSamplingOptions()
    )  # greedy needs no filter
    penal = StaticSamplingOptions.of(Sampling(presence_penalty=0.5, bad_words=((3,),)), min_tokens=2)
    assert penal == StaticSamplingOptions(penalties=True, bad_words=((3,),), min_tokens=True)
    both = nucleus.union(penal)
    assert both.union(nucleus) == both == both.union(penal) and both != nucleus


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty"),
        ({"repetition_penalty": 1e39}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"presence_penalty": 1e39}, "presence_penalty"),
        ({"frequency_penalty": -1e39}, "frequency_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"bad_words": ((),)}, "bad_words"),
    ],
)
def test_bad_options_are_refused_by_name(options, word):
    with pytest.raises(InputError, match=word):
        Sampling(**options)
