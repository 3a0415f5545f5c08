"""Rotary position embedding: tables of cosines and sines, and the rotation."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.types import Array
from posttrain_jax.models.config import RopeConfig


def rope_frequencies(head_dim: int, rope: RopeConfig) -> np.ndarray:
    """Angular frequency of each pair of the head, `[K // 2]` float32 (arXiv:2104.09864, section 3.2.2).

    "linear" divides every frequency by `factor`. "llama3" (Llama 3.1) divides the frequencies whose wavelength
    is longer than original_max_position / low_freq_factor, keeps those shorter than original_max_position /
    high_freq_factor, and goes smoothly from one to the other between.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequency = (1.0 / (rope.theta**exponent)).astype(np.float32)
    if rope.scaling == "linear":
        return frequency / np.float32(rope.factor)
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        ratio = rope.original_max_position / wavelength
        smooth = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return ((1 - smooth) * frequency / rope.factor + smooth * frequency).astype(np.float32)
    return frequency


def rope_tables(positions_BT: Array, head_dim: int, rope: RopeConfig) -> tuple[Array, Array]:
    """Cosines and sines of position times frequency, each `[B, T, K // 2]` float32."""
    frequency = jnp.asarray(rope_frequencies(head_dim, rope))
    angle = positions_BT[:, :, None].astype(jnp.float32) * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BTHK: Array, cos_BTk: Array, sin_BTk: Array) -> Array:
    """Rotates the pairs (i, i + K/2) of each head, as Hugging Face's checkpoints expect."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTk[:, :, None, :], sin_BTk[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)
