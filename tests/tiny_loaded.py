"""A tiny model with the byte tokenizer, as it is loaded."""

from __future__ import annotations

import pathlib

import jax

from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.models.io.source import Source
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
