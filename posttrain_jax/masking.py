"""Means, variances and shifts that take a mask, named for what they do."""

from __future__ import annotations

import jax.numpy as jnp

from posttrain_jax.types import Array


def masked_sum(values: Array, mask: Array) -> Array:
    """Sum of `values` where `mask` is non-zero; a value under a zero mask may even be NaN."""
    return jnp.sum(jnp.where(mask != 0, values, 0))


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of `values` where `mask` is non-zero; 0 when the mask is empty."""
    return masked_sum(values, mask) / jnp.maximum(jnp.sum(mask != 0), 1)


def shift_left(values_BT: Array, fill: int | float = 0) -> Array:
    """`values_BT[:, t + 1]` at place t, `fill` at the last place: targets (and their mask) from tokens."""
    return jnp.concatenate([values_BT[:, 1:], jnp.full_like(values_BT[:, :1], fill)], axis=1)


def lengths(mask_BT: Array) -> Array:
    """How many entries of each row are non-zero, `[B]` int32."""
    return jnp.sum(mask_BT != 0, axis=-1, dtype=jnp.int32)
