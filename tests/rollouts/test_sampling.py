"""Prompts, completions and trajectories, by hand."""

from __future__ import annotations

import dataclasses
import functools
import platform
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from posttrain_jax.core.sharding import make_mesh
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.data.sources import RowError
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.transformer import make_model
from posttrain_jax.rollouts.sampling import (
    RolloutOptions,
    Sampler,
    _give_back_memory,
    completion_of,
    encode_prompt,
    trajectory_of,
    truncate,
)
from posttrain_jax.rollouts.trajectory import BatchShape, put, stack
from posttrain_jax.sampling import decode as device
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate

OPTIONS = RolloutOptions(max_new_tokens=4, batch_size=2, stop_token_ids=(9,))


def prompt(*tokens: int) -> Prompt:
    return Prompt(np.asarray(tokens, np.int32), {}, "p:1")


def sample(tokens: list[int], reason: str) -> Sample:
    logps = -np.arange(1.0, len(tokens) + 1, dtype=np.float32)
    return Sample(0, 0, np.asarray(tokens, np.int32), logps * 10, logps, reason)


def test_every_number_stands_at_its_token():
    """Prompt 5 6 7 and completion 8 9 (the end), and a prompt of one token with a completion that was cut off."""
    ended = trajectory_of(prompt(5, 6, 7), sample([8, 9], "stop"), OPTIONS, policy_step=3)
    cut = trajectory_of(prompt(5), sample([1, 2, 3, 4], "length"), OPTIONS, policy_step=3)
    assert ended.tokens.tolist() == [5, 6, 7, 8, 9] and ended.response.tolist() == [8, 9]
    assert ended.response_mask.tolist() == [0, 0, 0, 1, 1]
    assert ended.sampler_logps.tolist() == [0, 0, 0, -1, -2]
    assert cut.response_mask.tolist() == [0, 1, 1, 1, 1] and cut.sampler_logps.tolist() == [0, -1, -2, -3, -4]
    assert (ended.ended, cut.ended, ended.policy_step, ended.has_score) == (True, False, 3, False)


@pytest.mark.parametrize(
    ("tokens", "ended", "after", "want"),
    [
        ([1, 13, 2, 13, 3], False, 0, ([1, 13], True)),
        ([1, 13, 2, 13, 3], False, 2, ([1, 13, 2, 13], True)),
        ([1, 13, 2, 3], True, 2, ([1, 13, 2, 3], False)),
        ([], False, 0, ([], False)),
    ],
)
def test_truncation_at_a_token(tokens, ended, after, want):
    """What lacks the token has not ended, even where the model ended it (Ziegler et al.: it gets the fixed score)."""
    answer, end = truncate(np.asarray(tokens, np.int32), ended, token=13, after=after)
    assert (answer.tolist(), end) == want


def test_without_a_truncation_token_an_answer_stays():
    answer, end = truncate(np.asarray([1, 2]), True, token=None, after=0)
    assert (answer.tolist(), end) == ([1, 2], True)


def test_a_batch_on_the_devices():
    """Sixteen trajectories of three tokens, whole on every device; their packed rows are split over the devices."""
    mesh = make_mesh()
    every = [trajectory_of(prompt(5), sample([n, 9], "stop"), OPTIONS, policy_step=2) for n in range(16)]
    every = [dataclasses.replace(one, score=float(n), has_score=n != 4) for n, one in enumerate(every)]
    shape = BatchShape(16, 4, epochs=1, minibatches=2, micro_batches=1, micro_rows=8, row_length=8)
    batch = put(stack(every, shape, np.arange(16)[None]), mesh, has_reference=False, auxiliary={})
    assert batch.tokens[:, 1].tolist() == list(range(16)) and batch.scores.tolist() == list(range(16))
    assert batch.has_score.tolist() == [1, 1, 1, 1, 0, *(1 for _ in range(11))]
    assert set(batch.policy_steps.tolist()) == {2} and batch.reference_logps is None
    assert batch.tokens.sharding.is_fully_replicated and not batch.indices.sharding.is_fully_replicated
    # Two of three tokens in a row of eight; trajectory n begins at 4 n, and 64 is padding.
    assert batch.indices[0, 0, 0, 0].tolist() == [0, 1, 2, 4, 5, 6, 64, 64]
    assert batch.indices[0, 1, 0, 0].tolist() == [32, 33, 34, 36, 37, 38, 64, 64]
    assert (batch.indices[0, :, 0, 4:] == 64).all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
def test_free_memory_is_given_back():
    """100 arrays of 4 MB in the heap, below one that stays: free, they still belong to the process, then no more."""

    def resident() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
        return int(line.split()[1]) * 1024

    np.ones(4_000_000)  # freed at once: from now on glibc has arrays below 32 MB in its heap
    arrays = [np.ones(500_000) for _ in range(100)]
    above = np.ones(500_000)
    del arrays
    before = resident()
    _give_back_memory()
    assert resident() < before - 300e6 and above[0] == 1


def test_one_engine_draws_for_a_whole_run():
    """Prompts of other lengths with other parameters, and greedy ones: the answers of an engine made for them alone,
    and no program more than for the first."""
    config = ModelConfig("llama", 97, 32, 2, 4, 2, 8, 48, max_length=96, query_scale=8**-0.5)
    model = make_model(config)
    options = RolloutOptions(max_new_tokens=8, samples=2, batch_size=4, stop_token_ids=(9,))
    one_device = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    sampler = Sampler(model, byte_tokenizer(), options, length=64, mesh=one_device)
    compiled, drawn, asked_of = [], [], []
    for step, (lengths, temperature) in enumerate([((5, 40), None), ((56, 1, 30), None), ((17,), 0.0)]):
        params = model.init(jax.random.key(step))
        prompts = [prompt(*range(3, 3 + length)) for length in lengths]
        drawn.append(sampler.sample(params, prompts, seed=step, policy_step=step, temperature=temperature))
        asked_of.append(
            (params, [one.tokens for one in prompts], 1.0 if temperature is None else temperature)
        )
        compiled.append(device.decode._cache_size() + device.prefill._cache_size())
    assert compiled[0] == compiled[1] == compiled[2]
    for step, (trajectories, (params, prompts, temperature)) in enumerate(zip(drawn, asked_of, strict=True)):
        sampling = Sampling(temperature)
        how = GenerateOptions(
            8, stop_token_ids=(9,), sampling=sampling, num_samples=2, seed=step, batch_size=4
        )
        alone = generate(model, params, prompts, how)
        assert [one.response.tolist() for one in trajectories] == [one.tokens.tolist() for one in alone]
        assert [one.group for one in trajectories] == [one.prompt for one in alone]


def test_a_trajectory_as_a_reward_sees_it():
    tokenizer = byte_tokenizer()
    ids = tokenizer("Hi")["input_ids"]
    question = Prompt(np.asarray(ids, np.int32), {"prompt": "Hi", "answer": 3}, "p:1")
    letters = tokenizer("ab")["input_ids"]
    one = completion_of(trajectory_of(question, sample(letters, "length"), OPTIONS, policy_step=0), tokenizer)
    assert (one.prompt, one.text, one.finish_reason, one.row["answer"]) == ("Hi", "ab", "length", 3)
    assert one.prompt_ids == tuple(ids) and one.token_ids == tuple(letters)


def test_a_prompt_is_text_messages_or_ids():
    tokenizer = byte_tokenizer()
    chat = [{"role": "user", "content": "Hi"}]
    written = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    encode = functools.partial(encode_prompt, tokenizer=tokenizer, vocab_size=260)
    assert tokenizer.decode(encode({"messages": chat})) == written
    assert tokenizer.decode(encode({"prompt": "Hi"})) == "Hi"
    assert encode({"prompt_ids": [3, 259]}).tolist() == [3, 259]
    assert tokenizer.decode(encode({"text": "Hi there"}, text_tokens=3)) == "Hi "
    assert tokenizer.decode(encode({"prompt": "Hi", "text": "there"})) == "Hi"


def test_a_prompt_of_messages_has_its_tools():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ messages[0].content }}"
    )
    row = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "add"}]}
    assert tokenizer.decode(encode_prompt(row, tokenizer, vocab_size=260)) == "[add]Hi"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "has none of them"),
        ({"prompt": "a", "prompt_ids": [1]}, "but has prompt and prompt_ids"),
        ({"prompt": 3}, "prompt: is a number, not a list"),
        ({"text": "a"}, "continued after its first data.prompt_tokens tokens, and that is not set"),
        ({"messages": "Hi"}, "messages: is text, not a list"),
        ({"prompt_ids": [1.5]}, "holds 1.5; token ids are whole numbers"),
        ({"prompt_ids": [1, 260]}, "has the token 260, and the policy has 260"),
        ({"prompt_ids": [3_000_000_000]}, "holds 3000000000, which is no token id"),
        ({"prompt_ids": [-1]}, "holds -1, which is no token id"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "add"}, "tools"),
    ],
)
def test_rows_without_a_prompt(row, words):
    with pytest.raises(RowError, match=words):
        encode_prompt(row, byte_tokenizer(), vocab_size=260)
