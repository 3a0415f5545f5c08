"""What ends or steers a completion: stop strings, bad words, penalties, long prompts; and what the engine refuses."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from completing import CONFIG, PROMPTS, assert_same, complete, sharp

from posttrain_jax.core.errors import InputError
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sampling.choose import Sampling, StaticSamplingOptions
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.requests import Request
from posttrain_jax.serving.pieces import Writer, join
from posttrain_jax.serving.token_text import Vocabulary


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stop_strings_end_an_answer_where_its_text_first_holds_them(batch_size):
    tokenizer = byte_tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer))
    model = make_model(config)
    params = sharp(model.init(jax.random.key(0)))
    options = {"max_new_tokens": 40, "temperature": 1.0, "tokenizer": tokenizer}
    free = complete(model, params, PROMPTS[:3], **options)
    texts = [tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in free]
    stop = texts[1][12:14]
    stopped = complete(
        model, params, PROMPTS[:3], stop_strings=(stop, "no such text"), batch_size=batch_size, **options
    )
    for sample, whole, text in zip(stopped, free, texts, strict=True):
        if stop not in text:
            assert sample.finish_reason == "length" and sample.stop_string is None
            np.testing.assert_array_equal(sample.tokens, whole.tokens)
            continue
        assert (sample.finish_reason, sample.stop_string) == ("stop", stop)
        np.testing.assert_array_equal(sample.tokens, whole.tokens[: len(sample.tokens)])
        kept = tokenizer.decode(sample.tokens, skip_special_tokens=True)
        assert stop in kept and stop not in tokenizer.decode(sample.tokens[:-1], skip_special_tokens=True)
    assert stopped[1].stop_string == stop


def test_a_stop_string_within_the_least_tokens_does_not_count():
    """The answer goes on to where the string comes again after them, alone, in a batch and token by token."""
    tokenizer = byte_tokenizer()
    model = make_model(dataclasses.replace(CONFIG, vocab_size=len(tokenizer)))
    params = sharp(model.init(jax.random.key(0)))
    options = {"max_new_tokens": 60, "temperature": 0.5, "top_k": 4, "tokenizer": tokenizer}
    (free,) = complete(model, params, PROMPTS[:1], min_new_tokens=1, **options)
    text = tokenizer.decode(free.tokens, skip_special_tokens=True)
    stop = next(char for char in text[:10] if char in text[20:40] and char.isascii())
    least = next(n for n in range(60) if stop in tokenizer.decode(free.tokens[:n])) + 2
    start = len(tokenizer.decode(free.tokens[:least]))
    (sample,) = complete(model, params, PROMPTS[:1], min_new_tokens=least, stop_strings=(stop,), **options)
    assert (sample.finish_reason, sample.stop_at) == ("stop", text.index(stop, start))
    kept = tokenizer.decode(sample.tokens, skip_special_tokens=True)
    assert stop in kept[start:] and stop not in tokenizer.decode(sample.tokens[:-1])[start:]

    request = Request(
        PROMPTS[0], 60, least, stop_strings=(stop,), sampling=Sampling(0.5, 4), prompt=0, seed=0
    )
    writer = Writer(tokenizer, Vocabulary(tokenizer), request, alternatives=None)
    static_options = StaticSamplingOptions.of(request.sampling, min_tokens=least)
    engine = Engine(
        model,
        params,
        slots=1,
        max_length=96,
        max_new_tokens=60,
        static_options=static_options,
        tokenizer=tokenizer,
    )
    engine.submit(request)
    pieces = []
    while engine.busy:
        pieces += [writer.piece(update) for update in engine.step(1)]
    assert len(pieces) > 3 and join(pieces).text == text[: sample.stop_at]


def test_a_stop_string_that_is_a_special_token_stops_as_that_token():
    """No text shows it. Here it is a token that the model is known to draw, which the tokenizer then calls special."""
    tokenizer = byte_tokenizer()
    model = make_model(dataclasses.replace(CONFIG, vocab_size=len(tokenizer)))
    params = sharp(model.init(jax.random.key(0)))
    options = {"max_new_tokens": 12, "temperature": 1.0, "tokenizer": tokenizer}
    token = int(complete(model, params, PROMPTS[:3], **options)[1].tokens[5])
    text = tokenizer.convert_ids_to_tokens(token)
    tokenizer.add_tokens([text], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(text) == token
    stopped = complete(model, params, PROMPTS[:3], stop_strings=(text,), **options)
    assert_same(stopped, complete(model, params, PROMPTS[:3], stop_token_ids=(token,), **options))
    assert stopped[1].finish_reason == "stop"


def test_bad_words_min_tokens_and_penalties_hold_over_a_whole_answer(model, params):
    free = complete(model, params, PROMPTS[:3], max_new_tokens=12)
    word = tuple(int(token) for token in free[0].tokens[4:6])
    single = int(free[2].tokens[0])
    banned = complete(model, params, PROMPTS[:3], max_new_tokens=12, bad_words=(word, (single,)))
    for sample in banned:
        tokens = sample.tokens.tolist()
        assert single not in tokens
        assert all(tuple(tokens[i : i + 2]) != word for i in range(len(tokens) - 1))
    np.testing.assert_array_equal(banned[0].tokens[:4], free[0].tokens[:4])
    once = complete(model, params, PROMPTS[:3], max_new_tokens=12, presence_penalty=1e4)
    assert all(len(set(sample.tokens.tolist())) == 12 for sample in once)
    new = complete(model, params, PROMPTS[:3], max_new_tokens=12, repetition_penalty=1e9)
    for prompt, sample in zip(PROMPTS, new, strict=False):
        assert not set(sample.tokens.tolist()) & set(prompt.tolist())


def test_sample_logprobs_are_of_the_distribution_drawn_from(model, params):
    """By hand from the full forward: log softmax of (logits / temperature) over the top k."""
    options = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 5, "seed": 2}
    (sample,) = complete(model, params, PROMPTS[:1], **options)
    whole = np.asarray([[*PROMPTS[0], *sample.tokens]])
    logits = np.asarray(model.apply(params, whole).logits_BTV)[0, len(PROMPTS[0]) - 1 : -1].astype(np.float64)
    for place, (token, logp) in enumerate(zip(sample.tokens, sample.sample_logprobs, strict=True)):
        scaled = logits[place] / 0.7
        kept = np.sort(scaled)[-5:]
        assert scaled[token] >= kept[0] - 1e-5
        assert logp == pytest.approx(scaled[token] - np.log(np.exp(kept).sum()), abs=1e-4)


def test_special_prompts(model, params):
    """Only a special token is a prompt like any other; one that fits exactly gets one token."""
    bos = np.asarray([0])
    (sample,) = complete(model, params, [bos], max_new_tokens=3)
    assert len(sample.tokens) == 3
    full = np.ones(95, np.int32)
    (sample,) = complete(model, params, [full], max_new_tokens=3)
    assert (len(sample.tokens), sample.finish_reason) == (1, "length")


def test_long_prompts_are_refused_or_cut_and_counted(model, params):
    long = np.arange(120) % 97
    options = {"max_new_tokens": 10}
    with pytest.raises(InputError, match="prompt 0 has 120 tokens, which leaves no room"):
        complete(model, params, [long], **options)
    with pytest.raises(InputError, match=r"prompt 0 has 120 tokens, more than max_prompt_tokens \(50\)"):
        complete(model, params, [long], max_prompt_tokens=50, **options)
    (cut,) = complete(model, params, [long], long_prompts="cut", **options)
    (tail,) = complete(model, params, [long[-86:]], **options)
    assert (cut.cut, tail.cut) == (34, 0)
    np.testing.assert_array_equal(cut.tokens, tail.tokens)
    (short,) = complete(model, params, [long], long_prompts="cut", max_prompt_tokens=20, **options)
    assert short.cut == 100 and len(short.tokens) == 10


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(np.ones(60, np.int32), 8), "leaves no room for a completion in the 48 tokens"),
        (Request(np.ones(3, np.int32), 0), "max_new_tokens is 0; it must lie between 1 and 8"),
        (Request(np.ones(3, np.int32), 9), "max_new_tokens is 9"),
        (Request(np.ones(3, np.int32), 8, stop_token_ids=(1, 2, 3)), "3 stop tokens; at most 2"),
        (Request(np.ones(3, np.int32), 8, stop_strings=("a",)), "stop strings need"),
        (Request(np.ones(3, np.int32), 8, sampling=Sampling(1.0)), "was not made for"),
        (Request(np.asarray([97]), 8), "token id 97"),
        (Request(np.ones(3, np.int32), 8, stop_token_ids=(2**31,)), "a number that is too large"),
        (Request(np.ones(3, np.int32), 8, prompt=2**32), "a number that is too large"),
    ],
)
def test_a_request_that_the_engine_was_not_made_for_is_refused(model, params, request_, words):
    engine = Engine(
        model,
        params,
        slots=1,
        max_length=48,
        max_new_tokens=8,
        static_options=StaticSamplingOptions(),
        max_stop_tokens=2,
    )
    with pytest.raises(InputError, match=words):
        engine.submit(request_)
    assert not engine.busy
