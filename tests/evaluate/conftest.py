"""Two tiny models with the byte tokenizer: a random one, and one that repeats the last token for ever."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from tiny_loaded import load

from posttrain_jax.models.io.load import LoadedModel


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
