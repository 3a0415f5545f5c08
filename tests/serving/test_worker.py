"""The engine's thread: events come in order, cancelled work gives its room back, and a failure is said to everyone."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import jax
import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sampling.choose import StaticSamplingOptions
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.generate import GenerateOptions, generate
from posttrain_jax.sampling.requests import Request
from posttrain_jax.serving.prompt_scores import score_prompts
from posttrain_jax.serving.worker import Full, Results, ScoringRequest, Stopped, Worker

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=96,
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    d_ff=32,
    max_length=4096,
    query_scale=8**-0.5,
)
PROMPTS = [np.asarray(ids, np.int32) for ids in ([5, 6, 7], [9], [1, 2, 3, 4], [5, 6, 7])]


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture
def params(model):
    return model.init(jax.random.key(0))


@contextlib.contextmanager
def working(model, params, *, capacity, failures=None):
    """A worker with two slots."""
    engine = Engine(
        model,
        params,
        slots=2,
        max_length=4096,
        max_new_tokens=4095,
        static_options=StaticSamplingOptions(alternatives=1),
    )
    worker = Worker(
        model, params, engine, capacity=capacity, on_failure=lambda: (failures or []).append("failed")
    )
    worker.start()
    yield worker
    worker.stop()
    worker.join()


async def tokens_of(answers):
    """All tokens of every request, by number."""
    tokens = {}
    async for number, update in answers:
        tokens.setdefault(number, []).extend(update.tokens.tolist())
    return tokens


def test_answers_and_scores_come_back_to_who_asked(model, params):
    options = GenerateOptions(max_new_tokens=20)
    expected = [sample.tokens.tolist() for sample in generate(model, params, PROMPTS, options)]

    async def ask(worker):
        requests = [Request(prompt, 20) for prompt in PROMPTS]
        several = [tokens_of(Results(worker, [request])) for request in requests]
        scores = [event async for event in Results(worker, [ScoringRequest(prompt, 1) for prompt in PROMPTS])]
        return await asyncio.gather(*several, tokens_of(Results(worker, requests))), scores

    with working(model, params, capacity=20) as worker:
        (*several, at_once), scores = asyncio.run(ask(worker))
    assert several == [{0: tokens} for tokens in expected]
    assert at_once == dict(enumerate(expected))
    assert sorted(number for number, _ in scores) == [0, 1, 2, 3]
    for number, score in scores:
        (alone,) = score_prompts(model, params, [PROMPTS[number]], alternatives=1)
        np.testing.assert_allclose(score.logprobs, alone.logprobs, atol=1e-5)


def test_room_is_given_back_by_what_ends_and_by_what_is_closed(model, params):
    async def ask(worker):
        long = Results(worker, [Request(PROMPTS[0], 4000) for _ in range(3)])
        await anext(long)
        with pytest.raises(Full):
            worker.check_room(1)
        long.close()
        long.close()
        worker.check_room(3)
        assert (await tokens_of(Results(worker, [Request(PROMPTS[1], 3)])))[0]
        worker.check_room(3)
        assert [event async for event in long] == []

    with working(model, params, capacity=3) as worker:
        asyncio.run(ask(worker))


def test_a_request_that_the_engine_refuses_does_not_stop_it(model, params):
    async def ask(worker):
        wrong = Results(worker, [Request(np.asarray([96], np.int32), 3)])
        with pytest.raises(InputError, match="token id 96"):
            await anext(wrong)
        wrong.close()
        assert (await tokens_of(Results(worker, [Request(PROMPTS[1], 3)])))[0]

    with working(model, params, capacity=1) as worker:
        asyncio.run(ask(worker))


def test_a_failure_ends_every_answer_and_takes_no_more(model, params, caplog):
    failures = []

    async def ask(worker):
        running = Results(worker, [Request(PROMPTS[0], 4000)])
        await anext(running)
        jax.tree.map(lambda leaf: leaf.delete(), params)  # the next prompt cannot be read
        other = Results(worker, [Request(PROMPTS[1], 3)])
        for answers in (running, other):
            with pytest.raises(Stopped):
                await tokens_of(answers)
            answers.close()
        with pytest.raises(Stopped):
            worker.check_room(1)

    with working(model, params, capacity=4, failures=failures) as worker, caplog.at_level(logging.CRITICAL):
        asyncio.run(ask(worker))
        assert worker.failed
