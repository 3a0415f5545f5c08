"""The engine: refill, reproducibility, stop strings, few programs; each against the full forward or a run apart."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import answers

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sampling import decode as device
from posttrain_jax.sampling import engine as engine_module
from posttrain_jax.sampling import slots as slots_module
from posttrain_jax.sampling.choose import Sampling, StaticSamplingOptions
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate_as_finished
from posttrain_jax.sampling.requests import Request
from posttrain_jax.sampling.slots import decode_params
from posttrain_jax.serving.pieces import Writer, join
from posttrain_jax.serving.token_text import Vocabulary

CONFIG = ModelConfig(
    "llama", 97, 32, 2, 4, 2, 8, 48, max_length=96, query_scale=8**-0.5, tied_embeddings=False
)  # fmt: skip
PROMPTS = [np.arange(3, 3 + n) % 97 for n in (5, 1, 17, 9, 30, 2, 12)]
DRAWN = {"temperature": 1.1, "top_k": 50, "top_p": 0.98, "seed": 4}


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return sharp(model.init(jax.random.key(3)))


def sharp(params):
    """Larger weights, so that answers are not one token over and over, and mistakes show."""
    params = jax.tree.map(lambda leaf: leaf * 8, params)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] / 4
    return params


def assert_same(left: list[Sample], right: list[Sample]) -> None:
    assert [(a.prompt, a.sample, a.finish_reason) for a in left] == [
        (b.prompt, b.sample, b.finish_reason) for b in right
    ]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
        np.testing.assert_allclose(a.sample_logprobs, b.sample_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_freed_slot_goes_to_the_next_prompt(model, params, options):
    """Two slots, seven prompts of unlike answers: each answer is that of the prompt alone, in input order."""
    limits = [3, 40, 1, 7, 25, 11, 2]
    together = answers(model, params, PROMPTS, max_new_tokens=limits, batch_size=2, **options)
    assert [len(sample.tokens) for sample in together] == limits
    at_once = answers(model, params, PROMPTS, max_new_tokens=limits, batch_size=7, **options)
    assert_same(together, at_once)
    alone = answers(model, params, PROMPTS[:2], max_new_tokens=limits[:2], batch_size=1, **options)
    assert_same(alone, together[:2])


def test_long_answers_do_not_hold_the_batch(model, params):
    """With 2 slots, a 40-token answer and seven of 5 tokens take the steps of the long one, not of four batches."""
    engine = Engine(
        model, params, slots=2, max_length=96, max_new_tokens=40, static_options=StaticSamplingOptions()
    )
    for index in range(8):
        engine.submit(Request(PROMPTS[0], max_new_tokens=40 if index == 0 else 5, prompt=index))
    finished, calls = [], 0
    while engine.busy:
        calls += 1
        finished += [update.request_id for update in engine.step() if update.finish_reason]
    assert finished[:6] == [1, 2, 3, 4, 5, 6] and sorted(finished[6:]) == [0, 7]
    assert calls == 7  # one for each short one in the other slot; the last goes on to the end of the long one


def test_what_was_resumed_is_what_was_not(model, params):
    options = GenerateOptions(
        max_new_tokens=9, sampling=Sampling(1.1, top_p=0.98), num_samples=2, seed=5, batch_size=3
    )
    whole = sorted(generate_as_finished(model, params, PROMPTS, options), key=place)
    done = {place(sample) for sample in whole[::2]}
    rest = sorted(generate_as_finished(model, params, PROMPTS, options, done=done), key=place)
    assert_same(rest, whole[1::2])


def place(sample: Sample) -> tuple[int, int]:
    return sample.prompt, sample.sample


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_a_mesh_gives_the_same_samples(model, params, shape):
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    sharded = jax.device_put(params, tree_shardings(params, mesh))
    options = {"max_new_tokens": [8, 3, 5, 8, 1, 6, 8], "batch_size": 8, "num_samples": 2, **DRAWN}
    assert_same(answers(model, sharded, PROMPTS, **options), answers(model, params, PROMPTS, **options))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["blocks", "splash"])
def test_any_number_of_prompts_of_any_length_is_read_on_a_mesh(attention):
    """Training's kernels want rows of 128 tokens, as many as the mesh divides: a short prompt, and a single one of 120
    tokens on 8 devices, are read all the same, with the same answers."""
    config = dataclasses.replace(CONFIG, max_length=256)
    mesh = make_mesh(data=8, fsdp=1, tensor=1)
    plain = make_model(config)
    params = sharp(plain.init(jax.random.key(3)))
    sharded = jax.device_put(params, tree_shardings(params, mesh))
    for length in (9, 120):
        prompts = [np.arange(3, 3 + length) % 97]
        want = answers(plain, params, prompts, max_new_tokens=3)
        got = answers(make_model(config, attention=attention), sharded, prompts, max_new_tokens=3)
        assert_same(got, want)


def test_noise_is_never_used_twice(model, params):
    """Same prompt, other place, sample or seed: other tokens. The same three: the same tokens."""
    options = {"max_new_tokens": 8, "temperature": 1.5}
    samples = answers(model, params, [PROMPTS[0]] * 3, num_samples=3, seed=0, **options)
    samples += answers(model, params, [PROMPTS[0]] * 3, num_samples=3, seed=1, **options)
    assert len({tuple(sample.tokens.tolist()) for sample in samples}) == 18
    again = answers(model, params, [PROMPTS[0]] * 3, num_samples=3, seed=0, **options)
    assert_same(again, samples[:9])
    with pytest.raises(InputError, match="seed is needed with a temperature"):
        GenerateOptions(8, sampling=Sampling(1.5))


@pytest.mark.parametrize("slots", [1, 2, 3, 15])
@pytest.mark.parametrize(
    "more",
    [{}, {"repetition_penalty": 1.3, "presence_penalty": 0.5, "bad_words": ((4, 5), (7,))}],
    ids=["plain", "penalties"],
)
def test_samples_of_a_prompt_share_one_prefill(model, params, slots, more, monkeypatch):
    """Also those that wait for a slot: every prompt is read once, and its answers are those of samples that start
    together. Answers of unlike length, so that slots come free one by one."""
    lengths_read = []

    def counted(params, state, tokens_PT, start, lengths_P, **options):
        lengths_read.extend(lengths_P.tolist())
        return prefill(params, state, tokens_PT, start, lengths_P, **options)

    options = {
        "max_new_tokens": 12,
        "num_samples": 5,
        "stop_token_ids": tuple(range(8, 16)),
        "seed": 4,
        **more,
    }
    options |= {"temperature": 1.1, "top_k": 50}  # no top_p: at its edge a tie may fall the other way
    together = answers(model, params, PROMPTS[:3], batch_size=15, **options)
    assert len({len(sample.tokens) for sample in together}) > 2
    prefill = device.prefill
    monkeypatch.setattr(device, "prefill", counted)
    assert_same(answers(model, params, PROMPTS[:3], batch_size=slots, **options), together)
    assert sorted(lengths_read) == sorted(len(prompt) for prompt in PROMPTS[:3])


def test_shared_prompts_survive_cancels_growth_and_what_is_written_behind_them(model, params, monkeypatch):
    """Few prompts, one of them as long as the context allows, asked for at random times and cancelled at random, in a
    cache that starts with 16 tokens: every answer is that of the prompt alone."""
    monkeypatch.setattr(slots_module, "INITIAL_CACHE_LENGTH", 16)
    monkeypatch.setattr(engine_module, "MIN_STEPS", 3)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[4], np.arange(95) % 97]
    alone = [sample.tokens for sample in answers(model, params, prompts, max_new_tokens=25, batch_size=1)]
    engine = Engine(
        model, params, slots=3, max_length=96, max_new_tokens=25, static_options=StaticSamplingOptions()
    )
    rng = np.random.default_rng(0)
    asked: dict[int, tuple[int, int]] = {}
    got: dict[int, list[int]] = {}
    finished = 0
    for _ in range(60):
        for _ in range(rng.integers(0, 3)):
            prompt, limit = int(rng.integers(len(prompts))), int(rng.integers(1, 26))
            ids = prompts[prompt].astype(rng.choice([np.int32, np.int64]))
            asked[engine.submit(Request(ids, limit))] = prompt, limit
        if asked and rng.random() < 0.2:
            cancelled = int(rng.choice(list(asked)))
            engine.cancel(cancelled)
            del asked[cancelled]
        for update in engine.step(int(rng.integers(1, 12))):
            tokens = got.setdefault(update.request_id, [])
            tokens += update.tokens.tolist()
            if update.finish_reason is not None:
                prompt, limit = asked.pop(update.request_id)
                assert tokens == alone[prompt][:limit].tolist(), (prompt, limit)
                finished += 1
    assert finished > 20


def test_few_programs_for_samples(model, params):
    engine = Engine(
        model,
        params,
        slots=8,
        max_length=64,
        max_new_tokens=4,
        static_options=StaticSamplingOptions(draw=True),
    )
    for prompt in range(2):
        for sample in range(8):
            engine.submit(Request(PROMPTS[prompt], 4, sampling=Sampling(1.0), prompt=prompt, sample=sample))
    while engine.busy:
        engine.step()
    # Each prompt is read once, put into a slot, copied into the 7 others, and begun on in all of them.
    assert engine.compiled_programs == len(("prefill", "fill", "copy", "begin", "decode"))


def test_what_was_compiled_ahead_is_all_that_any_request_needs(monkeypatch):
    """Prompts of 1 to 250 tokens, alone and in groups, answers that make the cache grow, cancels, other parameters:
    nothing is compiled after `warm_up`."""
    monkeypatch.setattr(slots_module, "INITIAL_CACHE_LENGTH", 128)
    model = make_model(dataclasses.replace(CONFIG, max_length=256))
    params = sharp(model.init(jax.random.key(3)))
    engine = Engine(
        model,
        params,
        slots=3,
        max_length=256,
        max_new_tokens=150,
        static_options=StaticSamplingOptions(draw=True),
    )
    programs = engine.warm_up()
    assert programs == 3 + 1 + 2 * len(("fill", "copy", "decode")) + 1  # 128 and 256 tokens; grown once
    compiled = cache_sizes()
    rng = np.random.default_rng(0)
    finished = 0
    for turn in range(8):
        for _ in range(rng.integers(1, 6)):
            tokens = rng.integers(0, 97, rng.integers(1, 250))
            limit = int(rng.integers(1, 150))
            request_ids = [
                engine.submit(Request(tokens, limit, sampling=Sampling(1.0), sample=sample))
                for sample in range(rng.integers(1, 4))
            ]
        engine.cancel(request_ids[0])
        while engine.busy:
            finished += sum(update.finish_reason is not None for update in engine.step(40))
        if turn == 3:
            engine.load(jax.tree.map(lambda leaf: leaf * 1.01, params))
        if turn == 5:
            engine.unload()
            engine.load(params)
    assert finished > 20
    assert (cache_sizes(), engine.compiled_programs) == (compiled, programs)


def cache_sizes() -> dict[str, int]:
    """How many programs of the engine this process has compiled, by name."""
    programs = (
        device.prefill,
        device.fill,
        device.copy_row,
        device.begin,
        device.grow,
        device.decode,
        device.release,
    )
    return {program.__name__: program._cache_size() for program in programs}


def test_a_long_prompt_is_prefilled_in_parts_while_others_are_decoded(model, params):
    """A chunk is prefilled, tokens are decoded, another chunk is prefilled; every completion is that of its prompt
    alone, also of the one that is cancelled in the middle of its prefill and requested again."""
    model = make_model(dataclasses.replace(CONFIG, max_length=2048))
    long = np.arange(700) % 97
    prompts = [PROMPTS[0], long, PROMPTS[1], PROMPTS[2]]
    alone = [
        sample.tokens.tolist() for sample in answers(model, params, prompts, max_new_tokens=30, batch_size=1)
    ]
    engine = Engine(
        model, params, slots=2, max_length=1024, max_new_tokens=30, static_options=StaticSamplingOptions()
    )
    asked = {engine.submit(Request(prompt, 30)): number for number, prompt in enumerate(prompts)}
    got: dict[int, list[int]] = {number: [] for number in range(4)}
    events, cancelled = [], False
    while engine.busy:
        engine.prefill(256)
        for update in engine.decode(4):
            number = asked[update.request_id]
            events.append(number)
            got[number] += update.tokens.tolist()
        if len(events) == 2 and not cancelled:
            engine.cancel(1)  # after two chunks of three
            asked[engine.submit(Request(long, 30))] = 1
            cancelled = True
    assert [got[number] for number in range(4)] == alone
    assert events[:3] == [0, 0, 0] and 2 in events[: events.index(1)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stop_strings_end_an_answer_where_its_text_first_holds_them(batch_size):
    tokenizer = byte_tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer))
    model = make_model(config)
    params = sharp(model.init(jax.random.key(0)))
    options = {"max_new_tokens": 40, "temperature": 1.0, "tokenizer": tokenizer}
    free = answers(model, params, PROMPTS[:3], **options)
    texts = [tokenizer.decode(sample.tokens, skip_special_tokens=True) for sample in free]
    stop = texts[1][12:14]
    stopped = answers(
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
    (free,) = answers(model, params, PROMPTS[:1], min_new_tokens=1, **options)
    text = tokenizer.decode(free.tokens, skip_special_tokens=True)
    stop = next(char for char in text[:10] if char in text[20:40] and char.isascii())
    least = next(n for n in range(60) if stop in tokenizer.decode(free.tokens[:n])) + 2
    start = len(tokenizer.decode(free.tokens[:least]))
    (sample,) = answers(model, params, PROMPTS[:1], min_new_tokens=least, stop_strings=(stop,), **options)
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
    token = int(answers(model, params, PROMPTS[:3], **options)[1].tokens[5])
    text = tokenizer.convert_ids_to_tokens(token)
    tokenizer.add_tokens([text], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(text) == token
    stopped = answers(model, params, PROMPTS[:3], stop_strings=(text,), **options)
    assert_same(stopped, answers(model, params, PROMPTS[:3], stop_token_ids=(token,), **options))
    assert stopped[1].finish_reason == "stop"


def test_bad_words_min_tokens_and_penalties_hold_over_a_whole_answer(model, params):
    free = answers(model, params, PROMPTS[:3], max_new_tokens=12)
    word = tuple(int(token) for token in free[0].tokens[4:6])
    single = int(free[2].tokens[0])
    banned = answers(model, params, PROMPTS[:3], max_new_tokens=12, bad_words=(word, (single,)))
    for sample in banned:
        tokens = sample.tokens.tolist()
        assert single not in tokens
        assert all(tuple(tokens[i : i + 2]) != word for i in range(len(tokens) - 1))
    np.testing.assert_array_equal(banned[0].tokens[:4], free[0].tokens[:4])
    once = answers(model, params, PROMPTS[:3], max_new_tokens=12, presence_penalty=1e4)
    assert all(len(set(sample.tokens.tolist())) == 12 for sample in once)
    new = answers(model, params, PROMPTS[:3], max_new_tokens=12, repetition_penalty=1e9)
    for prompt, sample in zip(PROMPTS, new, strict=False):
        assert not set(sample.tokens.tolist()) & set(prompt.tolist())


def test_sample_logprobs_are_of_the_distribution_drawn_from(model, params):
    """By hand from the full forward: log softmax of (logits / temperature) over the top k."""
    options = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 5, "seed": 2}
    (sample,) = answers(model, params, PROMPTS[:1], **options)
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
    (sample,) = answers(model, params, [bos], max_new_tokens=3)
    assert len(sample.tokens) == 3
    full = np.ones(95, np.int32)
    (sample,) = answers(model, params, [full], max_new_tokens=3)
    assert (len(sample.tokens), sample.finish_reason) == (1, "length")


def test_long_prompts_are_refused_or_cut_and_counted(model, params):
    long = np.arange(120) % 97
    options = {"max_new_tokens": 10}
    with pytest.raises(InputError, match="prompt 0 has 120 tokens, which leaves no room"):
        answers(model, params, [long], **options)
    with pytest.raises(InputError, match=r"prompt 0 has 120 tokens, more than max_prompt_tokens \(50\)"):
        answers(model, params, [long], max_prompt_tokens=50, **options)
    (cut,) = answers(model, params, [long], long_prompts="cut", **options)
    (tail,) = answers(model, params, [long[-86:]], **options)
    assert (cut.cut, tail.cut) == (34, 0)
    np.testing.assert_array_equal(cut.tokens, tail.tokens)
    (short,) = answers(model, params, [long], long_prompts="cut", max_prompt_tokens=20, **options)
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


def test_the_cache_grows_with_the_answers_and_shrinks_after_them(params, monkeypatch):
    """From 64 tokens on, doubling: the same completions as with the full length from the start."""
    model = make_model(dataclasses.replace(CONFIG, max_length=256))
    limits = [3, 150, 20, 90]
    whole = answers(model, params, PROMPTS[:4], max_new_tokens=limits, batch_size=2, **DRAWN)
    monkeypatch.setattr(slots_module, "INITIAL_CACHE_LENGTH", 64)
    monkeypatch.setattr(engine_module, "MIN_STEPS", 3)
    assert_same(answers(model, params, PROMPTS[:4], max_new_tokens=limits, batch_size=2, **DRAWN), whole)

    engine = Engine(
        model, params, slots=2, max_length=256, max_new_tokens=150, static_options=StaticSamplingOptions()
    )
    sizes = []
    for prompt, limit in zip(PROMPTS, [3, 150, 2], strict=False):
        engine.submit(Request(prompt, limit))
        while engine.busy:
            engine.step()
            sizes.append(engine._slots._layers[0]["v"].shape[2])
    assert sizes == [64, 64, 128, 256, 64]


def test_a_cancelled_request_gives_its_slot_back(model, params):
    engine = Engine(
        model, params, slots=1, max_length=96, max_new_tokens=60, static_options=StaticSamplingOptions()
    )
    first = engine.submit(Request(PROMPTS[0], 60))
    waiting = engine.submit(Request(PROMPTS[1], 60))
    last = engine.submit(Request(PROMPTS[2], 4))
    assert [update.request_id for update in engine.step(3)] == [first]
    engine.cancel(first)
    engine.cancel(waiting)
    updates = engine.step()
    assert [(update.request_id, update.finish_reason) for update in updates] == [(last, "length")]
    (alone,) = answers(model, params, PROMPTS[2:3], max_new_tokens=4)
    np.testing.assert_array_equal(updates[0].tokens, alone.tokens)
    assert not engine.busy and engine.step() == []


def test_tokens_come_as_they_are_drawn(model, params):
    engine = Engine(
        model,
        params,
        slots=2,
        max_length=96,
        max_new_tokens=20,
        static_options=StaticSamplingOptions(alternatives=2),
    )
    engine.submit(Request(PROMPTS[0], 20))
    parts = []
    while engine.busy:
        parts += engine.step(6)
    assert [len(part.tokens) for part in parts] == [7, 6, 6, 1]  # the first step also reads the prompt
    tokens = np.concatenate([part.tokens for part in parts])
    (whole,) = answers(model, params, PROMPTS[:1], max_new_tokens=20)
    np.testing.assert_array_equal(tokens, whole.tokens)
    pairs = [pair for part in parts for pair in part.alternatives]
    logprobs = np.concatenate([part.logprobs for part in parts])
    for token, logprob, alternatives in zip(tokens, logprobs, pairs, strict=True):
        assert len(alternatives) == 2 and alternatives[0][0] == token
        assert alternatives[0][1] == pytest.approx(logprob, abs=1e-5) and alternatives[1][1] <= logprob


def test_a_small_adapter_is_not_rounded_away_in_bfloat16():
    """Less than half of the last place of the kernel that it would be added to on a CPU: it stays apart where the model
    computes in bfloat16, and is added in float32 where only its parameters are stored so."""
    lora = LoraConfig(1, 1.0, ("down",))
    low, high = (make_model(CONFIG, dtype=dtype, lora=lora) for dtype in ("bfloat16", "float32"))
    params = low.init(jax.random.key(3))
    down = params["layers"]["mlp"]["down"]
    down |= {"kernel": jnp.ones_like(down["kernel"]), "lora_a": jnp.ones_like(down["lora_a"])}
    down["lora_b"] = jnp.full_like(down["lora_b"], 2.0**-10)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert decode_params(low, params) is params
    added = decode_params(high, params)["layers"][0]["mlp"]["down"]["kernel_out_in"]
    np.testing.assert_array_equal(added, np.float32(1.0 + 2.0**-10))


def test_other_parameters_can_be_put_in(model, params):
    """After a training step the same engine goes on with the new parameters."""
    engine = Engine(
        model, params, slots=1, max_length=64, max_new_tokens=8, static_options=StaticSamplingOptions()
    )
    engine.submit(Request(PROMPTS[0], 8))
    (before,) = engine.step()
    other = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    engine.load(other)
    engine.submit(Request(PROMPTS[0], 8))
    (after,) = engine.step()
    (want,) = answers(model, other, PROMPTS[:1], max_new_tokens=8)
    np.testing.assert_array_equal(after.tokens, want.tokens)
    assert (before.tokens != after.tokens).any()
