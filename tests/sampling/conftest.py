"""The model that the tests of the engine share."""

from __future__ import annotations

import jax
import pytest
from completing import CONFIG, sharp

from posttrain_jax.models.transformer import make_model


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return sharp(model.init(jax.random.key(3)))
