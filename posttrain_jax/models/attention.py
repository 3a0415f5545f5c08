"""Attention: softmax(scale * q k^T + mask) v, and which implementation of it a backend runs."""

from __future__ import annotations

import jax

from posttrain_jax.core.sharding import ambient_mesh
from posttrain_jax.core.types import Array
from posttrain_jax.models.attention_mask import AttentionMask
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.kernels.cpu_attention import BLOCK, attend_blocks
from posttrain_jax.models.kernels.gpu_attention import attend_cudnn
from posttrain_jax.models.kernels.tpu_attention import SPLASH_LANES, attend_splash
from posttrain_jax.models.kernels.xla_attention import attend_xla

IMPLEMENTATIONS = ("xla", "blocks", "cudnn", "splash")


def default_implementation(config: ModelConfig, dtype: str) -> str:
    """Splash on TPU; cuDNN on GPU where it can (bfloat16, no soft cap, heads up to 128), else XLA; blocks on CPU."""
    platform = jax.default_backend()
    if platform == "tpu":
        return "splash"
    if platform == "gpu" and dtype == "bfloat16" and not config.attn_softcap and config.head_dim <= 128:
        return "cudnn"
    return "blocks" if platform == "cpu" else "xla"


def attend(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    *,
    mask: AttentionMask,
    is_local: Array,
    config: ModelConfig,
    implementation: str,
) -> Array:
    """softmax(query_scale * q k^T, soft-capped, masked) v, `[B, T, H, K]`; the softmax in float32.

    `is_local` is a scalar bool array: whether this (scanned) layer uses the window. Splash and blocks need packed rows
    of a multiple of 128 tokens, and as many rows as the mesh divides; for others (the odd length of a prompt, a single
    row on many devices) XLA takes their place.
    """
    if implementation == "cudnn":
        return attend_cudnn(q_BTHK, k_BSGK, v_BSGK, mask, is_local, config)
    rows, time = q_BTHK.shape[:2]
    if mask.packed and _split_evenly(rows):
        if implementation == "splash" and time % SPLASH_LANES == 0:
            return attend_splash(q_BTHK, k_BSGK, v_BSGK, mask, is_local, config)
        if implementation == "blocks" and time % BLOCK == 0:
            return attend_blocks(q_BTHK, k_BSGK, v_BSGK, mask, is_local, config)
    return attend_xla(q_BTHK, k_BSGK, v_BSGK, mask, is_local, config)


def _split_evenly(rows: int) -> bool:
    """Whether the mesh's data and fsdp axes divide the rows, as `shard_map` needs."""
    mesh = ambient_mesh()
    return mesh is None or rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
