"""Cached decoding against the full forward pass, and what each option does."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from completing import complete

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.decoding import decode_layers
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sampling.choose import Sampling, StaticSamplingOptions
from posttrain_jax.sampling.decode import decode, empty_layers, empty_state
from posttrain_jax.sampling.shapes import bucket
from posttrain_jax.sampling.stream import Stream

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=97,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=64,
    query_scale=8**-0.5,
)
PROMPTS = [np.arange(3, 3 + n) % 97 for n in (5, 1, 17, 9)]


def sharpen(params):
    params["embed"]["embedding"] = params["embed"]["embedding"] * 10.0
    return params


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return sharpen(model.init(jax.random.key(3)))


def logprobs_after(model, params, prompt, answer) -> np.ndarray:
    """log softmax of the full forward pass at every place of the answer, `[n, V]`."""
    whole = np.zeros((1, 48), np.int32)  # one shape, one compilation; what follows is not seen
    stop = len(prompt) + len(answer)
    whole[0, :stop] = [*prompt, *answer]
    logits = forward(params, whole, model=model)[0, len(prompt) - 1 : stop - 1]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@functools.partial(jax.jit, static_argnames="model")
def forward(params, tokens_BT, *, model):
    return model.apply(params, tokens_BT).logits_BTV


def test_greedy_is_the_argmax_of_the_full_forward_at_every_step(model, params):
    samples = complete(model, params, PROMPTS, max_new_tokens=12, batch_size=3)
    assert [sample.prompt for sample in samples] == [0, 1, 2, 3]
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        expected = logprobs_after(model, params, prompt, sample.tokens)
        assert len(sample.tokens) == 12 and sample.finish_reason == "length"
        np.testing.assert_array_equal(sample.tokens, expected.argmax(axis=-1))
        np.testing.assert_allclose(sample.logprobs, expected[np.arange(12), sample.tokens], atol=1e-4, rtol=0)
        assert sample.logprobs.dtype == np.float32


def test_local_layers_and_softcap_decode_as_the_full_forward():
    """A sliding window shorter than the answer, and soft-capped logits."""
    config = dataclasses.replace(
        CONFIG,
        sliding_window=4,
        local_layers=(True, False),
        logits_softcap=5.0,
        norm_plus_one=True,
        sandwich_norms=True,
        qk_norm=True,
    )
    model = make_model(config)
    params = sharpen(model.init(jax.random.key(0)))
    (sample,) = complete(model, params, PROMPTS[:1], max_new_tokens=16)
    expected = logprobs_after(model, params, PROMPTS[0], sample.tokens)
    np.testing.assert_array_equal(sample.tokens, expected.argmax(axis=-1))
    np.testing.assert_allclose(sample.logprobs, expected.max(axis=-1), atol=1e-4, rtol=0)


def test_a_sample_does_not_depend_on_its_batch(model, params):
    """Alone, among others, in another batch size: the same tokens; logprobs are of temperature 1."""
    options = {
        "max_new_tokens": 10,
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.97,
        "num_samples": 3,
        "seed": 11,
    }
    together = complete(model, params, PROMPTS, batch_size=12, **options)
    apart = complete(model, params, PROMPTS, batch_size=2, **options)
    for left, right in zip(together, apart, strict=True):
        assert (left.prompt, left.sample) == (right.prompt, right.sample)
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-4, rtol=0)
        expected = logprobs_after(model, params, PROMPTS[left.prompt], left.tokens)
        np.testing.assert_allclose(left.logprobs, expected[np.arange(10), left.tokens], atol=1e-4, rtol=0)
    assert len({tuple(sample.tokens) for sample in together}) == 12
    alone = complete(model, params, PROMPTS[:1], batch_size=12, **options)
    np.testing.assert_array_equal(alone[2].tokens, together[2].tokens)
    other = complete(model, params, PROMPTS, batch_size=12, **{**options, "seed": 12})
    assert any((a.tokens != b.tokens).any() for a, b in zip(together, other, strict=True))


def test_top_k_of_one_is_greedy(model, params):
    greedy = complete(model, params, PROMPTS, max_new_tokens=6)
    drawn = complete(model, params, PROMPTS, max_new_tokens=6, temperature=5.0, top_k=1)
    narrow = complete(model, params, PROMPTS, max_new_tokens=6, temperature=1.0, top_p=1e-6)
    for a, b, c in zip(greedy, drawn, narrow, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.tokens, c.tokens)


def test_stop_tokens_end_an_answer_and_belong_to_it(model, params):
    free = complete(model, params, PROMPTS, max_new_tokens=8)
    stop = int(free[2].tokens[3])
    first = int(np.flatnonzero(free[2].tokens == stop)[0])
    stopped = complete(model, params, PROMPTS, max_new_tokens=8, stop_token_ids=(stop,))
    assert stopped[2].finish_reason == "stop"
    np.testing.assert_array_equal(stopped[2].tokens, free[2].tokens[: first + 1])
    assert len(stopped[2].logprobs) == first + 1

    ignoring = complete(model, params, PROMPTS, max_new_tokens=8, stop_token_ids=(stop,), ignore_eos=True)
    for a, b in zip(free, ignoring, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert b.finish_reason == "length"

    late = complete(
        model, params, PROMPTS, max_new_tokens=8, stop_token_ids=(stop,), min_new_tokens=first + 2
    )[2]
    assert len(late.tokens) >= first + 2 and stop not in late.tokens[: first + 1]
    # What was forbidden is left out of the choice but not of the model's own probabilities.
    expected = logprobs_after(model, params, PROMPTS[2], late.tokens)
    np.testing.assert_allclose(
        late.logprobs, expected[np.arange(len(late.tokens)), late.tokens], atol=1e-4, rtol=0
    )


def test_no_tokens_asked_for(model, params):
    samples = complete(model, params, PROMPTS[:2], max_new_tokens=0, num_samples=2)
    assert [len(sample.tokens) for sample in samples] == [0] * 4
    assert {sample.finish_reason for sample in samples} == {"length"}
    assert complete(model, params, [], max_new_tokens=3) == []


def test_an_answer_ends_where_the_context_is_full(model, params):
    long, short = np.full(CONFIG.max_length - 3, 5), np.asarray([5])
    samples = complete(model, params, [long, short], max_new_tokens=8)
    assert [len(sample.tokens) for sample in samples] == [3, 8]
    assert samples[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "row 7 has no tokens"),
        ([1, 97], {}, "row 7 holds the token id 97; the model knows 0 to 96"),
        ([-1], {}, "row 7 holds the token id -1"),
        ([1.5], {}, "row 7 holds float64"),
        ([1] * 64, {}, "row 7 has 64 tokens, which leaves no room"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([1], {"min_new_tokens": 5}, "min_new_tokens is 5"),
        ([1], {"num_samples": 0}, "num_samples is 0"),
        ([1], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(model, params, prompt, options, words):
    prompts = [np.asarray([1]), np.asarray(prompt)]
    with pytest.raises(InputError, match=words):
        complete(
            model,
            params,
            prompts,
            names=("row 6", "row 7"),
            **{"max_new_tokens": 4, **options},
        )


def test_sharded_parameters_give_the_same_answers(model, params):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = jax.device_put(params, tree_shardings(params, mesh))
    whole = complete(model, params, PROMPTS[:3], max_new_tokens=6, temperature=0.7)
    split = complete(model, sharded, PROMPTS[:3], max_new_tokens=6, temperature=0.7)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4, rtol=0)


def test_shapes_are_rounded_up_to_few():
    assert [bucket(n) for n in (0, 1, 16, 17, 24, 25, 33, 48, 49, 100)] == [
        16, 16, 16, 24, 24, 32, 48, 48, 64, 128,
    ]  # fmt: skip
    sizes = {bucket(n) for n in range(1, 1025)}
    assert len(sizes) == 13 and all(bucket(size) == size for size in sizes)


def test_the_decode_loop_copies_neither_cache_nor_weights():
    """Beside its arguments, which it writes in place, the loop holds the logits of one position and little more."""
    config = dataclasses.replace(CONFIG, vocab_size=1024, max_length=4096, d_model=64, head_dim=16)
    model = make_model(config)
    slots = jax.eval_shape(lambda: empty_layers(model=model, rows=4, length=4096))
    state = jax.eval_shape(
        lambda: empty_state(
            model=model, rows=4, max_new_tokens=8, static_options=StaticSamplingOptions(), max_stop_tokens=1
        )
    )
    params = model.abstract_params()
    layers = jax.eval_shape(functools.partial(decode_layers, lora_scale=0.0), params["layers"])
    params = {**params, "layers": layers}
    count, flag = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool)
    compiled = decode.lower(
        params, slots, state, count, flag, model=model, static_options=StaticSamplingOptions()
    ).compile()
    memory = compiled.memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slots))
    assert memory.alias_size_in_bytes >= cache_bytes
    # Scores of one layer (4 rows x 4 heads x 4096 tokens) a few times over, against 8.4 MB of cache.
    assert memory.temp_size_in_bytes < cache_bytes / 4


def test_stream_says_what_generate_says_and_reads_only_what_is_new(model, params):
    stream = Stream(model, params, stop_token_ids=())
    first = PROMPTS[2]
    (whole,) = complete(model, params, [first], max_new_tokens=7)
    answer = list(stream.complete(first, max_new_tokens=7, sampling=Sampling()))
    assert answer == whole.tokens.tolist()

    # The next turn repeats the conversation and adds to it; a third one goes back to an earlier place.
    for prompt in ([*first, *answer, 8, 9], [*first[:4], 20, 21]):
        prompt = np.asarray(prompt)
        (whole,) = complete(model, params, [prompt], max_new_tokens=7)
        assert list(stream.complete(prompt, max_new_tokens=7, sampling=Sampling())) == whole.tokens.tolist()


def test_a_stream_may_be_left_at_any_token(model, params):
    stream = Stream(model, params, stop_token_ids=())
    tokens = stream.complete(PROMPTS[0], max_new_tokens=9, sampling=Sampling())
    left = [next(tokens) for _ in range(3)]
    tokens.close()
    prompt = np.asarray([*PROMPTS[0], *left, 4])
    (whole,) = complete(model, params, [prompt], max_new_tokens=5)
    assert list(stream.complete(prompt, max_new_tokens=5, sampling=Sampling())) == whole.tokens.tolist()


def test_a_stream_ends_at_a_stop_token(model, params):
    (whole,) = complete(model, params, PROMPTS[:1], max_new_tokens=7)
    stop = int(whole.tokens[2])
    stream = Stream(model, params, stop_token_ids=(stop,))
    answer = list(stream.complete(PROMPTS[0], max_new_tokens=7, sampling=Sampling()))
    assert answer[-1] == stop and answer == whole.tokens[: len(answer)].tolist()
    with pytest.raises(InputError, match="the conversation has 64 tokens"):
        list(stream.complete(np.ones(64, np.int32), max_new_tokens=1, sampling=Sampling()))
