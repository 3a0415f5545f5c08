"""A tiny model and its prompts, and `generate` with every option as a keyword, for the tests of the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate

CONFIG = ModelConfig(
    "llama", 97, 32, 2, 4, 2, 8, 48, max_length=96, query_scale=8**-0.5, tied_embeddings=False
)  # fmt: skip
PROMPTS = [np.arange(3, 3 + n) % 97 for n in (5, 1, 17, 9, 30, 2, 12)]
DRAWN = {"temperature": 1.1, "top_k": 50, "top_p": 0.98, "seed": 4}
SAMPLING = {field.name for field in dataclasses.fields(Sampling)}


def complete(
    model: Model, params: Any, prompts: Sequence[np.ndarray], *, tokenizer: Any = None, **options: Any
) -> list[Sample]:
    """The options are fields of `GenerateOptions` and of `Sampling`."""
    sampling = {name: options.pop(name) for name in SAMPLING & options.keys()}
    names = options.pop("names", ())
    generate_options = GenerateOptions(sampling=Sampling(**sampling), **{"seed": 0, **options})
    return generate(model, params, prompts, generate_options, tokenizer=tokenizer, names=names)


def sharp(params):
    """Larger weights, so that answers are not one token over and over, and mistakes show."""
    params = jax.tree.map(lambda leaf: leaf * 8, params)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] / 4
    return params


def assert_same(left: list[Sample], right: list[Sample]) -> None:
    assert [(a.prompt, a.sample, a.finish_reason) for a in left] == [
        (b.prompt, b.sample, b.finish_reason) for b in right
    ]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
        np.testing.assert_allclose(a.sample_logprobs, b.sample_logprobs, atol=1e-4, rtol=0)
