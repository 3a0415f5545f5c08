"""posttrain_jax: post-training of language models in JAX. See README.md."""

from __future__ import annotations

__version__ = "0.1.0"


def load(model: str, dtype: str = "float32"):
    """Loads a MODEL (Hugging Face folder or name, `.gguf` file, or a workdir of ours, `DIR` or `DIR@STEP`).

    Returns a `posttrain_jax.load_model.LoadedModel` with `config`, `params`, `tokenizer` and
    `apply(params, tokens_BT, *, segment_ids_BT=None, positions_BT=None) -> ModelOutput`.
    """
    from posttrain_jax.load_model import load_model

    return load_model(model, dtype=dtype)
