"""A tiny random model for the judges."""

from __future__ import annotations

import pytest
from tiny_loaded import load

from posttrain_jax.models.io.load import LoadedModel


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return load(8.0, 1.0)
