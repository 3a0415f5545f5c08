"""The engine: refill, reproducibility, stop strings, few programs; each against the full forward or a run apart."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from completing import CONFIG, DRAWN, PROMPTS, assert_same, complete, sharp

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.models.config import LoraConfig
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sampling import decode as device
from posttrain_jax.sampling import engine as engine_module
from posttrain_jax.sampling import slots as slots_module
from posttrain_jax.sampling.choose import Sampling, StaticSamplingOptions
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate_as_finished
from posttrain_jax.sampling.requests import Request
from posttrain_jax.sampling.slots import decode_params


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_freed_slot_goes_to_the_next_prompt(model, params, options):
    """Two slots, seven prompts of unlike answers: each answer is that of the prompt alone, in input order."""
    limits = [3, 40, 1, 7, 25, 11, 2]
    together = complete(model, params, PROMPTS, max_new_tokens=limits, batch_size=2, **options)
    assert [len(sample.tokens) for sample in together] == limits
    at_once = complete(model, params, PROMPTS, max_new_tokens=limits, batch_size=7, **options)
    assert_same(together, at_once)
    alone = complete(model, params, PROMPTS[:2], max_new_tokens=limits[:2], batch_size=1, **options)
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
    assert_same(complete(model, sharded, PROMPTS, **options), complete(model, params, PROMPTS, **options))


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
        want = complete(plain, params, prompts, max_new_tokens=3)
        got = complete(make_model(config, attention=attention), sharded, prompts, max_new_tokens=3)
        assert_same(got, want)


def test_noise_is_never_used_twice(model, params):
    """Same prompt, other place, sample or seed: other tokens. The same three: the same tokens."""
    options = {"max_new_tokens": 8, "temperature": 1.5}
    samples = complete(model, params, [PROMPTS[0]] * 3, num_samples=3, seed=0, **options)
    samples += complete(model, params, [PROMPTS[0]] * 3, num_samples=3, seed=1, **options)
    assert len({tuple(sample.tokens.tolist()) for sample in samples}) == 18
    again = complete(model, params, [PROMPTS[0]] * 3, num_samples=3, seed=0, **options)
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
    together = complete(model, params, PROMPTS[:3], batch_size=15, **options)
    assert len({len(sample.tokens) for sample in together}) > 2
    prefill = device.prefill
    monkeypatch.setattr(device, "prefill", counted)
    assert_same(complete(model, params, PROMPTS[:3], batch_size=slots, **options), together)
    assert sorted(lengths_read) == sorted(len(prompt) for prompt in PROMPTS[:3])


def test_shared_prompts_survive_cancels_growth_and_what_is_written_behind_them(model, params, monkeypatch):
    """Few prompts, one of them as long as the context allows, asked for at random times and cancelled at random, in a
    cache that starts with 16 tokens: every answer is that of the prompt alone."""
    monkeypatch.setattr(slots_module, "INITIAL_CACHE_LENGTH", 16)
    monkeypatch.setattr(engine_module, "MIN_STEPS", 3)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[4], np.arange(95) % 97]
    alone = [sample.tokens for sample in complete(model, params, prompts, max_new_tokens=25, batch_size=1)]
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
        sample.tokens.tolist() for sample in complete(model, params, prompts, max_new_tokens=30, batch_size=1)
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


def test_the_cache_grows_with_the_answers_and_shrinks_after_them(params, monkeypatch):
    """From 64 tokens on, doubling: the same completions as with the full length from the start."""
    model = make_model(dataclasses.replace(CONFIG, max_length=256))
    limits = [3, 150, 20, 90]
    whole = complete(model, params, PROMPTS[:4], max_new_tokens=limits, batch_size=2, **DRAWN)
    monkeypatch.setattr(slots_module, "INITIAL_CACHE_LENGTH", 64)
    monkeypatch.setattr(engine_module, "MIN_STEPS", 3)
    assert_same(complete(model, params, PROMPTS[:4], max_new_tokens=limits, batch_size=2, **DRAWN), whole)

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
    (alone,) = complete(model, params, PROMPTS[2:3], max_new_tokens=4)
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
    (whole,) = complete(model, params, PROMPTS[:1], max_new_tokens=20)
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
    (want,) = complete(model, other, PROMPTS[:1], max_new_tokens=8)
    np.testing.assert_array_equal(after.tokens, want.tokens)
    assert (before.tokens != after.tokens).any()
