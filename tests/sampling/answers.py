"""`generate` with every option as a keyword, for tests that name only a few."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate

SAMPLING = {field.name for field in dataclasses.fields(Sampling)}


def answers(
    model: Model, params: Any, prompts: Sequence[np.ndarray], *, tokenizer: Any = None, **options: Any
) -> list[Sample]:
    """The options are fields of `GenerateOptions` and of `Sampling`."""
    how = {name: options.pop(name) for name in SAMPLING & options.keys()}
    names = options.pop("names", ())
    asked = GenerateOptions(sampling=Sampling(**how), **{"seed": 0, **options})
    return generate(model, params, prompts, asked, tokenizer=tokenizer, names=names)
