"""Two tiny models with the byte tokenizer: a random one, and one that repeats the last token for ever."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import pytest

from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.load import LoadedModel, Source
from posttrain_jax.models.transformer import make_model

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=260,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=128,
    query_scale=8**-0.5,
)


def load(scale: float, layers: float) -> LoadedModel:
    """`scale` multiplies the embeddings (tied with the head), `layers` all that the layers do."""
    model = make_model(CONFIG)
    params = model.init(jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"] * scale
    params["layers"] = jax.tree.map(lambda leaf: leaf * layers, params["layers"])
    tokenizer = byte_tokenizer()
    return LoadedModel(CONFIG, params, tokenizer, model, Source("tiny", "hf", pathlib.Path()))


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return load(8.0, 1.0)


@pytest.fixture(scope="session")
def parrot() -> LoadedModel:
    """Without layers, the logits are products of the last token's embedding with all embeddings; its own is the
    largest."""
    found = load(20.0, 0.0)
    embedding = found.params["embed"]["embedding"]
    unit = embedding / jnp.linalg.norm(embedding, axis=1, keepdims=True)
    return LoadedModel(
        found.config,
        {**found.params, "embed": {**found.params["embed"], "embedding": 20.0 * unit}},
        found.tokenizer,
        found.model,
        found.source,
    )
