"""The transformer against itself: every attention implementation, remat policy and cache gives the same."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.models.attention import attend
from posttrain_jax.models.attention_mask import AttentionMask
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.kernels.cpu_attention import BLOCK, RowLayout, first_key_blocks
from posttrain_jax.models.kernels.matmul import MANY_ROWS, lora_matmul
from posttrain_jax.models.kernels.tpu_attention import attend_splash
from posttrain_jax.models.kv_cache import init_cache
from posttrain_jax.models.transformer import REMAT_POLICIES, make_model

PLAIN = ModelConfig("llama", 61, 32, 2, 4, 2, 8, 48, query_scale=8**-0.5)
GEMMA = ModelConfig(
    "gemma3_text", 61, 32, 3, 4, 1, 8, 48, query_scale=8**-0.5, attn_softcap=5.0, logits_softcap=10.0,
    sandwich_norms=True, qk_norm=True, norm_plus_one=True, activation="gelu_tanh", embed_scale=32**0.5,
    sliding_window=40, local_layers=(True, False, True),
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [PLAIN, GEMMA], ids=["llama", "gemma"])


def packed(time: int):
    """Two rows with sequences of unlike lengths, the first ending in padding."""
    segments, positions = np.zeros((2, time), np.int32), np.zeros((2, time), np.int32)
    for row, cuts in enumerate(([0, 0.35, 0.6, 0.9], [0, 0.08, 0.1, 0.7, 1.0])):
        edges = [round(cut * time) for cut in cuts]
        for number, (start, stop) in enumerate(itertools.pairwise(edges), 1):
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
    return jnp.asarray(segments), jnp.asarray(positions)


def sharp(params):
    """Larger weights, so that attention is not flat and mistakes in the mask show."""
    return jax.tree.map(lambda leaf: leaf * 4, params)


def loss_and_gradient(model, params, time):
    segments, positions = packed(time)
    tokens = jax.random.randint(jax.random.key(1), (2, time), 0, 61)

    def loss(params):
        output = model.apply(params, tokens, segment_ids_BT=segments, positions_BT=positions)
        return jnp.sum(jnp.sin(output.logits_BTV) * (segments > 0)[..., None])

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.max(jnp.abs(b))), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


@CONFIGS
def test_block_attention_equals_xla(config):
    models = [make_model(config, attention=name) for name in ("xla", "blocks")]
    params = sharp(models[0].init(jax.random.key(0)))
    want, got = (loss_and_gradient(model, params, 3 * BLOCK) for model in models)
    assert_close(got, want, 2e-5)


def test_block_attention_visits_only_the_blocks_it_needs():
    """One sequence of 2 blocks, then one of 1: the third block of queries starts at its own block of keys."""
    segments = jnp.repeat(jnp.array([[1, 1, 2]]), BLOCK, axis=1)
    index = jnp.arange(3 * BLOCK)[None]
    two = RowLayout(segments, jnp.where(segments == 1, index, index - 2 * BLOCK))
    np.testing.assert_array_equal(first_key_blocks(two, jnp.int32(3 * BLOCK)), [[0, 0, 2]])
    whole = RowLayout(jnp.ones_like(segments), index)
    np.testing.assert_array_equal(first_key_blocks(whole, jnp.int32(3 * BLOCK)), [[0, 0, 0]])
    np.testing.assert_array_equal(first_key_blocks(whole, jnp.int32(2)), [[0, 0, 1]])


def test_block_attention_with_branches_reaches_back_to_the_prompt():
    """A prompt of 2 blocks, a branch of 1 that begins at position 255: with a window of 2 it sees positions from 254,
    which lie in the prompt's second block; with a window of 200, from 56 on, in its first."""
    ones = jnp.ones((1, 3 * BLOCK), jnp.int32)
    index = jnp.arange(3 * BLOCK)[None]
    branches = (index >= 2 * BLOCK).astype(jnp.int32)
    places = RowLayout(ones, jnp.where(branches == 1, index - 1, index), branches)
    np.testing.assert_array_equal(first_key_blocks(places, jnp.int32(2)), [[0, 0, 1]])
    np.testing.assert_array_equal(first_key_blocks(places, jnp.int32(200)), [[0, 0, 0]])


@pytest.mark.parametrize("window", [0, 40])
def test_splash_attention_equals_xla(window):
    """The TPU kernel in Pallas' interpreter; its compilation for a TPU is checked elsewhere."""
    local = (window > 0,)
    config = ModelConfig(
        "llama",
        61,
        32,
        1,
        4,
        2,
        8,
        48,
        query_scale=0.4,
        attn_softcap=6.0,
        sliding_window=window,
        local_layers=local,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 256, 4, 8))
    k, v = (jax.random.normal(key, (2, 256, 2, 8)) for key in keys[1:])
    segments, positions = packed(256)
    mask = AttentionMask.packed_rows(segments, positions)
    want = attend(q, k, v, mask=mask, is_local=jnp.array(window > 0), config=config, implementation="xla")
    got = attend_splash(q, k, v, mask, jnp.array(window > 0), config, interpret=True)
    real = (segments > 0)[..., None, None]
    np.testing.assert_allclose(jnp.where(real, got, 0), jnp.where(real, want, 0), atol=2e-5)


@CONFIGS
def test_every_remat_policy_gives_the_same_gradient(config):
    params = sharp(make_model(config).init(jax.random.key(0)))
    want = loss_and_gradient(make_model(config, remat="none"), params, 64)
    for name in REMAT_POLICIES:
        assert_close(loss_and_gradient(make_model(config, remat=name), params, 64), want, 1e-5)


@CONFIGS
def test_cached_decode_equals_full_forward(config):
    """Prefill of unlike lengths with padding on the right, then single tokens."""
    model = make_model(config)
    params = sharp(model.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 50), 0, 61)
    want = model.apply(params, tokens).logits_BTV
    lengths = np.array([44, 30])
    real = (np.arange(44)[None] < lengths[:, None]).astype(np.int32)
    cache = init_cache(config, 2, 50)
    output = model.apply(params, tokens[:, :44], segment_ids_BT=jnp.asarray(real), cache=cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(output.logits_BTV[row, :length], want[row, :length], atol=2e-4)
    for step in range(6):
        next_tokens = tokens[np.arange(2), lengths + step][:, None]
        output = model.apply(params, next_tokens, cache=output.cache)
        np.testing.assert_allclose(output.logits_BTV[:, 0], want[np.arange(2), lengths + step], atol=2e-4)
    np.testing.assert_array_equal(output.cache["length"], lengths + 6)


@CONFIGS
def test_packed_rows_equal_separate_rows(config):
    model = make_model(config)
    params = sharp(model.init(jax.random.key(0)))
    segments, positions = packed(128)
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, 61)
    whole = model.apply(params, tokens, segment_ids_BT=segments, positions_BT=positions).logits_BTV
    for row in range(2):
        for segment in range(1, int(segments[row].max()) + 1):
            (places,) = np.nonzero(np.asarray(segments[row]) == segment)
            alone = model.apply(params, tokens[row : row + 1, places]).logits_BTV
            np.testing.assert_allclose(whole[row, places], alone[0], atol=2e-4)


def test_lora_starts_as_the_base_model_and_then_adds_its_product():
    config, lora = PLAIN, LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))
    base, adapted = make_model(config), make_model(config, lora=lora)
    params = adapted.init(jax.random.key(0))
    tokens = jnp.arange(10)[None]
    plain = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf, base.init(jax.random.key(0)))
    assert "lora_a" in params["layers"]["attn"]["q"] and "lora_a" not in params["layers"]["attn"]["k"]
    stripped = base.apply(params, tokens).logits_BTV
    np.testing.assert_array_equal(adapted.apply(params, tokens).logits_BTV, stripped)
    assert jax.tree.structure(plain) != jax.tree.structure(params)
    q = params["layers"]["attn"]["q"]
    q["lora_b"] = jnp.ones_like(q["lora_b"])
    merged = base.init(jax.random.key(0))
    for group, names in params["layers"].items():
        for name, leaf in names.items() if isinstance(names, dict) else ():
            if isinstance(leaf, dict):
                merged["layers"][group][name]["kernel"] = leaf["kernel"]
    merged["embed"], merged["final_norm"] = params["embed"], params["final_norm"]
    product = jnp.einsum("lir,lro->lio", q["lora_a"], q["lora_b"])
    merged["layers"]["attn"]["q"]["kernel"] = q["kernel"] + 2.0 * product
    got, want = adapted.apply(params, tokens).logits_BTV, base.apply(merged, tokens).logits_BTV
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0, 0.25])
def test_lora_products_have_the_gradient_of_the_plain_formula(scale):
    """x W + scale (x A) B, differentiated by JAX itself."""
    shapes = ((2, MANY_ROWS // 2, 24), (24, 40), (24, 4), (4, 40))
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys[:4], shapes, strict=True)]
    weights = jax.random.normal(keys[4], (2, MANY_ROWS // 2, 40)) / MANY_ROWS

    def plain(x, kernel, a, b):
        return jnp.sum(weights * jnp.sin(x @ kernel + scale * (x @ a) @ b))

    def ours(x, kernel, a, b):
        return jnp.sum(weights * jnp.sin(lora_matmul(x, kernel, a, b, scale)))

    want = jax.value_and_grad(plain, argnums=(0, 1, 2, 3))(*arrays)
    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3)))(*arrays)
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_says_the_same_of_few_rows_and_of_many(dtype):
    """Rows below MANY_ROWS and from there on take different products."""
    lora = LoraConfig(rank=4, alpha=8.0, targets=("q", "o", "up", "down"))
    model = make_model(PLAIN, lora=lora, dtype=dtype)
    params = jax.tree.map(lambda leaf: leaf + 0.02, model.init(jax.random.key(0)))
    tokens = jnp.broadcast_to(jnp.arange(8)[None] % 61, (MANY_ROWS // 8, 8))
    many = model.apply(params, tokens).hidden_BTD[:1]
    few = model.apply(params, tokens[:1]).hidden_BTD
    tolerance = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(many.astype("float32"), few.astype("float32"), atol=tolerance)


def test_bfloat16_stays_close():
    params = make_model(PLAIN).init(jax.random.key(0))
    tokens = jnp.arange(16)[None]
    low = make_model(PLAIN, dtype="bfloat16").apply(params, tokens)
    assert low.hidden_BTD.dtype == jnp.bfloat16 and low.logits_BTV.dtype == jnp.float32
    np.testing.assert_allclose(low.logits_BTV, make_model(PLAIN).apply(params, tokens).logits_BTV, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remat": "some"}, r"train\.remat is 'some'"),
        ({"dtype": "float16"}, r"model\.dtype is 'float16'"),
        ({"attention": "flash"}, r"model\.attention is 'flash'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_model(PLAIN, **options)
