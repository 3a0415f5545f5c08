"""Attention on GPUs: cuDNN's fused kernel."""

from __future__ import annotations

import jax

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import Array
from posttrain_jax.models.attention_mask import AttentionMask
from posttrain_jax.models.config import ModelConfig


def attend_cudnn(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: AttentionMask, is_local: Array, config: ModelConfig
) -> Array:
    """cuDNN's fused attention through `jax.nn`; 16-bit floats, no soft cap."""
    if config.attn_softcap:
        raise InputError(
            f"model.attention=cudnn cannot soft-cap scores, which {config.model_type} needs; use xla."
        )
    local = is_local if config.any_local else None
    allowed = mask.allowed(slice(None), slice(None), local, config.sliding_window)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, mask=allowed[:, None], scale=config.query_scale, implementation="cudnn"
    )
