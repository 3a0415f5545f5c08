"""Sampling filters on literal logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.errors import InputError
from posttrain_jax.sampling import choose as choose_module
from posttrain_jax.sampling.choose import Sampling, choose, keep_likeliest, sample_keys

# Probabilities 0.5, 0.25, 0.15, 0.1 at the places 2, 0, 3, 1.
LOGITS = jnp.log(jnp.asarray([[0.25, 0.1, 0.5, 0.15]]))


def kept(top_k: int, top_p: float, logits=LOGITS) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(keep_likeliest(logits, top_k, top_p))[0])).tolist()


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


def test_top_p_is_the_same_when_the_nucleus_is_wider_than_its_head(monkeypatch):
    """The quick look at the likeliest few and the whole sort give the same nucleus."""
    logits = jax.random.normal(jax.random.key(1), (3, 50))
    whole = keep_likeliest(logits, 0, 0.9)
    monkeypatch.setattr(choose_module, "NUCLEUS_HEAD", 2)
    np.testing.assert_array_equal(keep_likeliest(logits, 0, 0.9), whole)
    assert 2 < np.isfinite(np.asarray(whole[0])).sum() < 50


def test_draws_follow_the_softmax_of_logits_over_temperature():
    """0.5^2 : 0.25^2 : 0.15^2 : 0.1^2 over their sum 0.345 at temperature 1/2."""
    keys = sample_keys(7, jnp.arange(4000), jnp.zeros(4000, jnp.int32))
    logits = jnp.broadcast_to(LOGITS, (4000, 4))
    drawn = np.bincount(np.asarray(choose(logits, keys, Sampling(0.5))), minlength=4) / 4000
    np.testing.assert_allclose(drawn, np.asarray([0.0625, 0.01, 0.25, 0.0225]) / 0.345, atol=0.03)
    greedy = choose(logits, keys, Sampling(0.0))
    assert (np.asarray(greedy) == 2).all()


def test_every_prompt_and_sample_has_its_own_random_numbers():
    keys = sample_keys(0, jnp.asarray([0, 0, 1, 1]), jnp.asarray([0, 1, 0, 1]))
    assert len({tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()}) == 4


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_options_are_refused_by_name(options, word):
    with pytest.raises(InputError, match=word):
        Sampling(**options)
