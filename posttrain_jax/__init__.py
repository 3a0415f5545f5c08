"""posttrain_jax: post-training of language models in JAX. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain_jax.sampling.loaded import Loaded

__version__ = "0.1.0"


def load(model: str, dtype: str = "float32") -> Loaded:
    """Loads a MODEL (Hugging Face folder or name, `.gguf` file, or a workdir of ours, `DIR` or `DIR@STEP`).

    Returns a `posttrain_jax.sampling.loaded.Loaded` with `chat`, `generate` and (for a reward model) `score`, with
    `config`, `params` and `tokenizer`, and with `apply(params, tokens_BT, *, segment_ids_BT=None, positions_BT=None)
    -> ModelOutput`.
    """
    from posttrain_jax.models.io.load import load_model
    from posttrain_jax.sampling.loaded import Loaded

    return Loaded(**vars(load_model(model, dtype=dtype)))
