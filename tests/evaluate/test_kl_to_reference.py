"""KL on fresh samples against the exact KL of tiny models, by enumerating every answer."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.kl_to_reference import estimate, kl_to_reference, ratio
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sampling.generate import Sample

CONFIG = ModelConfig("llama", 7, 16, 1, 2, 1, 8, 24, max_length=16, query_scale=8**-0.5)
MODEL = make_model(CONFIG)
PROMPT = np.asarray([2, 5, 3], np.int32)
STOP = 4


def params_of(seed):
    """Random weights, sharpened so that two such models differ by a fair part of a nat."""
    params = MODEL.init(jax.random.key(seed))
    params["embed"]["embedding"] = params["embed"]["embedding"] * 10.0
    return params


POLICY, REFERENCE = params_of(0), params_of(1)


def next_logps(params, texts):
    logits = MODEL.apply(params, jnp.asarray(np.stack(texts))).logits_BTV[:, -1]
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def exact(stop):
    """(KL, mean length) of answers of at most 2 tokens, the first of which may be `stop`; every answer is listed."""
    texts = [np.append(PROMPT, token).astype(np.int32) for token in range(7)]
    first = [next_logps(params, [PROMPT])[0] for params in (POLICY, REFERENCE)]
    second = [next_logps(params, texts) for params in (POLICY, REFERENCE)]
    kl = length = total = 0.0
    for one, two in itertools.product(range(7), range(7)):
        if one == stop:
            continue
        p, q = (first[side][one] + second[side][one, two] for side in (0, 1))
        kl, length, total = kl + np.exp(p) * (p - q), length + 2 * np.exp(p), total + np.exp(p)
    if stop is not None:
        p, q = first[0][stop], first[1][stop]
        kl, length, total = kl + np.exp(p) * (p - q), length + np.exp(p), total + np.exp(p)
    assert total == pytest.approx(1.0, abs=1e-5)
    return kl, length


def sampled(reference, *, prompts=400, num_samples=2, stops=(), **options):
    return kl_to_reference(
        MODEL,
        POLICY,
        MODEL,
        reference,
        [PROMPT] * prompts,
        num_samples=num_samples,
        seed=3,
        stop_token_ids=stops,
        batch_size=100,
        **{"max_new_tokens": 2, **options},
    )


@pytest.mark.parametrize("stop", [None, STOP])
def test_both_estimates_lie_within_a_few_standard_errors_of_the_exact_kl(stop):
    kl, length = exact(stop)
    assert kl > 0.3
    found = sampled(REFERENCE, stops=() if stop is None else (stop,))
    assert (found.prompts, found.samples) == (400, 800)
    for mean, wanted in (
        (found.k1_per_sequence, kl),
        (found.k3_per_sequence, kl),
        (found.k1_per_token, kl / length),
        (found.k3_per_token, kl / length),
    ):
        assert mean.value == pytest.approx(wanted, abs=4 * mean.standard_error)
        assert 0 < mean.standard_error < 0.25 * wanted
    lengths = found.tokens_per_sequence
    assert lengths.value == pytest.approx(length, abs=4 * lengths.standard_error + 1e-6)


def test_a_model_is_no_way_from_itself():
    found = sampled(POLICY, prompts=5)
    for mean in (found.k1_per_sequence, found.k3_per_sequence, found.k1_per_token, found.k3_per_token):
        assert (mean.value, mean.standard_error) == (0.0, 0.0)


def test_by_hand():
    """Two prompts. log p - log q: answers (1, 1) and (0) of the first, (2, -1, 1) of the second. Sums 2, 0, 2: k1 per
    sequence 4 / 3, per token 4 / 6, length 6 / 3. By prompt: sums 2 and 2, answers 2 and 1; residuals from 4/3 are
    -2/3 and 2/3, so se = sqrt(2 * (4/9 + 4/9)) / 3 = 4/9. k3 of 1, 0, 2, -1: e^-1, 0, e^-2 + 1, e - 2."""
    differences = [[1.0, 1.0], [0.0], [2.0, -1.0, 1.0]]
    samples = [
        Sample(prompt, number, np.zeros(len(part), np.int32), np.zeros(0), np.zeros(0), "length")
        for prompt, number, part in zip([0, 0, 1], [0, 1, 0], differences, strict=True)
    ]
    policy = [np.asarray(part, np.float32) - 3.0 for part in differences]
    reference = [np.full(len(part), -3.0, np.float32) for part in differences]
    found = estimate(samples, policy, reference)
    assert found.k1_per_sequence.value == pytest.approx(4 / 3)
    assert found.k1_per_sequence.standard_error == pytest.approx(4 / 9)
    assert found.k1_per_token.value == pytest.approx(4 / 6)
    assert found.tokens_per_sequence.value == 2.0
    e = np.e
    assert found.k3_per_sequence.value == pytest.approx((3 / e + e**-2 + 1 + e - 2) / 3, rel=1e-5)
    assert dataclasses.asdict(found)["samples"] == 3


def test_the_standard_error_is_that_of_a_mean_where_counts_are_equal():
    """1, 2, 3, 6 with mean 3: squares 4 + 1 + 0 + 9 = 14, se = sqrt(14 / 3 / 4)."""
    found = ratio(np.asarray([1.0, 2.0, 3.0, 6.0]), np.ones(4))
    assert (found.value, found.standard_error) == (3.0, pytest.approx((14 / 12) ** 0.5))
    assert ratio(np.ones(1), np.ones(1)).standard_error is None


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(InputError, match="no prompts"):
        sampled(REFERENCE, prompts=0)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        sampled(REFERENCE, prompts=1, max_new_tokens=0)
    with pytest.raises(InputError, match="not finite"):
        sampled(jax.tree.map(lambda leaf: leaf * np.nan, REFERENCE), prompts=1)
    other = make_model(dataclasses.replace(CONFIG, vocab_size=9))
    with pytest.raises(InputError, match="7 tokens and the reference's 9"):
        kl_to_reference(
            MODEL, POLICY, other, other.init(jax.random.key(0)), [PROMPT], max_new_tokens=1, seed=0
        )
