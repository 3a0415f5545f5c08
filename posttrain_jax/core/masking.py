"""Means, variances, whitening and shifts that take a mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array


def masked_sum(values: Array, mask: Array) -> Array:
    """Sum of `values` where `mask` is non-zero; a value under a zero mask may even be NaN."""
    return jnp.sum(jnp.where(mask != 0, values, 0))


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of `values` where `mask` is non-zero; 0 when the mask is empty."""
    return masked_sum(values, mask) / jnp.maximum(jnp.sum(mask != 0), 1)


def biased_variance(values: Array, mask: Array) -> Array:
    """Mean squared distance from the mean where `mask` is non-zero (divided by n), float32; 0 when it is empty."""
    values = values.astype(jnp.float32)
    return masked_mean(jnp.square(values - masked_mean(values, mask)), mask)


def unbiased_variance(values: Array, mask: Array) -> Array:
    """As `biased_variance`, divided by n - 1 instead of n; 0 when fewer than two entries are unmasked."""
    count = jnp.sum(mask != 0)
    return biased_variance(values, mask) * count / jnp.maximum(count - 1, 1)


def whiten_biased(values: Array, mask: Array, *, shift_mean: bool) -> Array:
    """(x - mean) / sqrt(var + 1e-8) over the unmasked entries, var divided by n; float32, 0 where masked.

    OpenAI's lm-human-preferences (arXiv:1909.08593) and Huang et al. (arXiv:2403.17031). TRL's PPO and verl divide
    the variance by n - 1: `whiten_unbiased`.

    Args:
      values: of any shape; what stands under a zero mask may even be NaN.
      mask: of the same shape; all unmasked entries are one population (not one per row).
      shift_mean: False adds the mean back, so that only the spread becomes 1 (for rewards, whose mean matters).
    """
    return _whiten(values, mask, biased_variance(values, mask), shift_mean)


def whiten_unbiased(values: Array, mask: Array, *, shift_mean: bool) -> Array:
    """`whiten_biased` with the variance divided by n - 1 (as in TRL's PPO and verl)."""
    return _whiten(values, mask, unbiased_variance(values, mask), shift_mean)


def _whiten(values: Array, mask: Array, variance: Array, shift_mean: bool) -> Array:
    values = jnp.where(mask != 0, values.astype(jnp.float32), 0.0)
    mean = masked_mean(values, mask)
    whitened = (values - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask != 0, whitened if shift_mean else whitened + mean, 0.0)


def shift_left(values_BT: Array, fill: int | float = 0) -> Array:
    """`values_BT[:, t + 1]` at index t, `fill` at the last index: targets (and their mask) from tokens."""
    return jnp.concatenate([values_BT[:, 1:], jnp.full_like(values_BT[:, :1], fill)], axis=1)


def lengths(mask_BT: Array) -> Array:
    """How many entries of each row are non-zero, `[B]` int32."""
    return jnp.sum(mask_BT != 0, axis=-1, dtype=jnp.int32)
