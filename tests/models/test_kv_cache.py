"""The cache's layout: what is written at a place is read at that place, in one block of keys or in many."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import kv_cache
from posttrain_jax.models.attention_mask import AttentionMask
from posttrain_jax.models.cached_attention import attend_cache
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.transformer import make_model

CONFIG = ModelConfig("llama", 61, 32, 2, 4, 2, 8, 48, query_scale=8**-0.5)
BLOCKS = pytest.mark.parametrize("block", [kv_cache.CPU_BLOCK, 0], ids=["blocks", "one block"])


def empty(monkeypatch, rows: int, length: int, block: int):
    """As on a CPU, or (`block` 0) as elsewhere."""
    if not block:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    return kv_cache.init_cache(CONFIG, rows, length)


def keys(layer) -> np.ndarray:
    """`[B, S, G, K]`, as they were given."""
    k_BGCKJ = np.asarray(layer["k"])
    return k_BGCKJ.transpose(0, 2, 4, 1, 3).reshape(k_BGCKJ.shape[0], -1, *k_BGCKJ.shape[1:4:2])


def values(layer) -> np.ndarray:
    return np.asarray(layer["v"]).transpose(0, 2, 1, 3)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@BLOCKS
def test_room_is_rounded_up_to_whole_blocks_on_a_cpu_alone(monkeypatch, block):
    cache = empty(monkeypatch, 3, 70, block)
    assert cache["positions"].shape == (3, 128 if block else 70)
    assert cache["layers"][0]["k"].shape == ((3, 2, 2, 8, 64) if block else (3, 2, 1, 8, 70))
    assert cache["layers"][1]["v"].shape == (3, 2, 128 if block else 70, 8)
    assert (cache["positions"] == -1).all() and (cache["length"] == 0).all()


@BLOCKS
def test_tokens_are_written_at_their_places_and_nowhere_else(monkeypatch, block):
    """Two rows of three tokens across the end of a block; one token out of range."""
    layer = empty(monkeypatch, 2, 128, block)["layers"][0]
    k, v = random(2, 3, 2, 8), random(2, 3, 2, 8) + 1
    index = np.array([[62, 63, 64], [0, 127, 128]])
    want = {"k": np.zeros((2, 128, 2, 8), np.float32), "v": np.zeros((2, 128, 2, 8), np.float32)}
    for row, token in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        want["k"][row, index[row, token]], want["v"][row, index[row, token]] = k[row, token], v[row, token]
    layer = kv_cache.append(layer, jnp.asarray(k), jnp.asarray(v), jnp.asarray(index))
    np.testing.assert_array_equal(keys(layer), want["k"])
    np.testing.assert_array_equal(values(layer), want["v"])


@BLOCKS
@pytest.mark.parametrize("time", [5, 64, 100, 200])
def test_sequences_are_put_into_rows(monkeypatch, block, time):
    """Rows 2 and 0 begin with them, one goes nowhere, row 1 stays; of 200 tokens a row of 128 holds the first."""
    layer = empty(monkeypatch, 3, 128, block)["layers"][0]
    layer = jax.tree.map(lambda leaf: leaf + 7, layer)
    k, v = random(3, time, 2, 8), random(3, time, 2, 8) + 1
    layer = kv_cache.put_rows(layer, jnp.asarray(k), jnp.asarray(v), jnp.asarray([2, 3, 0]))
    kept = min(time, 128)
    for row, source in ((2, 0), (0, 2)):
        np.testing.assert_array_equal(keys(layer)[row, :kept], k[source, :kept])
        np.testing.assert_array_equal(values(layer)[row, :kept], v[source, :kept])
    assert (keys(layer)[1] == 7).all() and (values(layer)[1] == 7).all()


@BLOCKS
def test_more_room_keeps_what_is_held(monkeypatch, block):
    k, v = jnp.asarray(random(2, 64, 2, 8)), jnp.asarray(random(2, 64, 2, 8))
    layer = kv_cache.put_rows(empty(monkeypatch, 2, 64, block)["layers"][0], k, v, jnp.arange(2))
    more = kv_cache.grow(layer, 192)
    assert jax.tree.map(jnp.shape, more) == jax.tree.map(
        jnp.shape, empty(monkeypatch, 2, 192, block)["layers"][0]
    )
    np.testing.assert_array_equal(keys(more)[:, :64], k)
    np.testing.assert_array_equal(values(more)[:, :64], v)


def test_a_prompt_that_is_read_in_parts_attends_as_the_whole_does():
    """In chunks of unlike lengths over PREFILL_BLOCK places at a time, with a window in the local layer and soft-capped
    scores: the hidden states of the whole forward, for two prompts at a time."""
    config = dataclasses.replace(
        CONFIG, max_length=600, sliding_window=40, local_layers=(True, False), attn_softcap=20.0, head_dim=8
    )
    model = make_model(config, attention="xla")
    params = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 600)).astype(np.int32)
    whole = model.apply(params, jnp.asarray(tokens), logits=False).hidden_BTD
    cache = kv_cache.init_prefill_cache(config, 2, 600)
    assert cache["k"].shape == (2, 2, 768, 2, 8)
    parts = []
    for start, stop in ((0, 256), (256, 384), (384, 512)):
        hidden, cache = model.prefill(
            params, jnp.asarray(tokens[:, start:stop]), start=jnp.int32(start), cache=cache
        )
        parts.append(np.asarray(hidden))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), np.asarray(whole)[:, :512], atol=2e-5)


@pytest.mark.parametrize("time", [1, 3])
def test_attention_does_not_depend_on_the_blocks(monkeypatch, time):
    """Against plain attention over each row's own places."""
    lengths = np.array([100, 17])
    k, v, q = random(2, 128, 2, 8), random(2, 128, 2, 8) + 1, random(2, time, 4, 8)
    order = np.arange(128)[None]
    places = jnp.asarray(np.where(order < lengths[:, None], order, -1))
    queries = jnp.asarray(lengths[:, None] - time + np.arange(time)[None])
    want = np.zeros((2, time, 4, 8))
    for row, token, head in np.ndindex(2, time, 4):
        seen = int(queries[row, token]) + 1
        scores = 8**-0.5 * k[row, :seen, head // 2] @ q[row, token, head]
        weights = np.exp(scores - scores.max())
        want[row, token, head] = weights @ v[row, :seen, head // 2] / weights.sum()
    for block in (64, 0):
        layer = empty(monkeypatch, 2, 128, block)["layers"][0]
        layer = kv_cache.put_rows(layer, jnp.asarray(k), jnp.asarray(v), jnp.arange(2))
        got = attend_cache(
            jnp.asarray(q),
            layer["k"],
            layer["v"],
            mask=AttentionMask.cached(queries, places),
            is_local=jnp.asarray(False),
            config=CONFIG,
        )
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
