"""Splitting and joining parameter trees; masked means and shifts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core.masking import lengths, masked_mean, masked_sum, shift_left
from posttrain_jax.core.trees import combine, global_norm, leaf_paths, parameter_count, partition

TREE = {"a": {"x": jnp.ones(2), "lora_a": jnp.zeros(3)}, "b": jnp.full(1, 2.0)}


def test_partition_and_combine_are_inverse():
    kept, rest = partition(TREE, lambda path: path.endswith("lora_a"))
    assert leaf_paths(kept) == ["a/lora_a"]
    assert leaf_paths(rest) == ["a/x", "b"]
    assert leaf_paths(combine(rest, kept)) == leaf_paths(TREE)


def test_partition_drops_empty_branches():
    kept, rest = partition(TREE, lambda path: path.startswith("a"))
    assert "b" not in kept and "a" not in rest


def test_combine_refuses_a_leaf_twice():
    with pytest.raises(ValueError, match="'b' is in both"):
        combine({"b": 1}, {"b": 2})


def test_norm_and_count_by_hand():
    """Two ones and one 2: sqrt(1 + 1 + 4); 2 + 3 + 1 scalars."""
    np.testing.assert_allclose(global_norm(TREE), np.sqrt(6.0), rtol=1e-6)
    assert parameter_count(TREE) == 6


def test_masked_mean_ignores_what_is_masked():
    values = jnp.array([1.0, jnp.nan, 3.0])
    assert masked_mean(values, jnp.array([1, 0, 1])) == 2.0
    assert masked_sum(values, jnp.array([1, 0, 1])) == 4.0
    assert masked_mean(values, jnp.zeros(3)) == 0.0


def test_shift_left_and_lengths():
    np.testing.assert_array_equal(shift_left(jnp.array([[1, 2, 3]])), [[2, 3, 0]])
    np.testing.assert_array_equal(lengths(jnp.array([[1, 1, 0], [0, 0, 0]])), [2, 0])
