"""The exactness gate: the engine's log-probabilities against the training forward pass."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from completing import complete

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sampling.score import (
    BFLOAT16_LARGEST,
    BFLOAT16_MEAN,
    FLOAT32_LARGEST,
    Difference,
    difference,
    score_samples,
)

LLAMA = ModelConfig("llama", 97, 32, 2, 4, 2, 8, 48, max_length=96, query_scale=8**-0.5)
GEMMA = ModelConfig(
    "gemma3_text", 97, 32, 3, 4, 1, 8, 48, max_length=96, query_scale=8**-0.5, attn_softcap=5.0,
    logits_softcap=10.0, sandwich_norms=True, qk_norm=True, norm_plus_one=True, activation="gelu_tanh",
    embed_scale=32**0.5, sliding_window=12, local_layers=(True, False, True),
)  # fmt: skip
PROMPTS = [np.arange(3, 3 + n) % 97 for n in (5, 1, 17, 9, 30)]


def sampled(config, dtype="float32", mesh=None, lora=None):
    model = make_model(config, dtype=dtype, lora=lora)
    params = model.init(jax.random.key(0))
    if lora is not None:  # adapters start at zero
        params = jax.tree.map(
            lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(1), leaf.shape), params
        )
    params["embed"]["embedding"] = params["embed"]["embedding"] * 10.0
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(params, mesh))
    samples = complete(
        model,
        params,
        PROMPTS,
        max_new_tokens=[30, 5, 12, 1, 25],
        temperature=1.0,
        num_samples=2,
        batch_size=3,
    )
    scores = score_samples(model, params, PROMPTS, samples, batch_rows=4)
    return difference([sample.logprobs for sample in samples], scores)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_every_sampled_token_has_the_trainers_log_probability(config):
    apart = sampled(config)
    assert apart.tokens == 2 * (30 + 5 + 12 + 1 + 25)
    assert 0 <= apart.mean <= apart.largest < FLOAT32_LARGEST


@pytest.mark.slow
def test_with_biases_and_adapters():
    """On a CPU the decode loop reads joined kernels with the adapters added, the prompts the layers as trained."""
    biased = dataclasses.replace(LLAMA, qkv_bias=True, tied_embeddings=False)
    assert sampled(biased, lora=LoraConfig(rank=4, alpha=8.0)).largest < FLOAT32_LARGEST


@pytest.mark.slow
def test_on_a_mesh_too():
    assert sampled(LLAMA, mesh=make_mesh(data=2, fsdp=2, tensor=2)).largest < FLOAT32_LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_bfloat16_stays_within_its_bounds(config):
    apart = sampled(config, "bfloat16")
    assert FLOAT32_LARGEST < apart.largest < BFLOAT16_LARGEST  # it does round
    assert apart.mean < BFLOAT16_MEAN


def test_the_gate_stops_a_run_that_differs():
    """Scores of other parameters: as when a sampler was not told of an update."""
    assert difference([np.asarray([-1.0, -2.0])], [np.asarray([-1.0, -2.5])]) == Difference(0.5, 0.25, 2)
    assert difference([], []) == Difference(0.0, 0.0, 0)
    Difference(0.5, 0.25, 2).check(0.6)
    Difference(0.5, 0.25, 2).check(0)
    with pytest.raises(InputError, match=r"up to 0\.5 nats \(mean 0\.25 over 2 tokens\)"):
        Difference(0.5, 0.25, 2).check(1e-4)
    with pytest.raises(InputError, match="up to nan"):
        difference([np.asarray([np.nan])], [np.asarray([-1.0])]).check(1e-4)
