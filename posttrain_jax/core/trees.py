"""Parameter trees: names of leaves, splitting a tree in two and joining it again, norms, counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.types import Array, PyTree


def leaf_path(key_path: tuple) -> str:
    """ "layers/attn/q/kernel" from JAX's key path; works for dicts, dataclasses, tuples and named tuples."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaf_paths(tree: PyTree) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`."""
    return [leaf_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def partition(tree: dict, keep: Callable[[str], bool]) -> tuple[dict, dict]:
    """Splits nested dicts in two: leaves whose path satisfies `keep`, and the rest. Empty dicts vanish.

    Frozen parameters are split off before the gradient is taken, so that neither gradients nor optimizer
    state nor the gradient norm ever see them.
    """

    def split(node: dict, prefix: str) -> tuple[dict, dict]:
        kept: dict = {}
        rest: dict = {}
        for name, child in node.items():
            path = f"{prefix}/{name}" if prefix else name
            if isinstance(child, dict):
                child_kept, child_rest = split(child, path)
                if child_kept:
                    kept[name] = child_kept
                if child_rest:
                    rest[name] = child_rest
            else:
                (kept if keep(path) else rest)[name] = child
        return kept, rest

    return split(tree, "")


def fingerprint(tree: PyTree) -> str:
    """A hash of the arrays' bits, their shapes and paths (24 hexadecimal digits), computed where the arrays lie.

    Every 32-bit word is multiplied by an odd number that depends on its index, and the products are added modulo 2^32,
    twice. So it tells whether two trees are equal, but it is no protection against a collision made on purpose.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        words = [int(word) for word in np.asarray(_word_sums(leaf))]
        digest.update(f"{leaf_path(path)} {leaf.shape} {leaf.dtype} {words}".encode())
    return digest.hexdigest()[:24]


@jax.jit
def _word_sums(leaf: Array) -> Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    first = jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
    mixed = words ^ (words >> 13)
    second = jnp.sum(mixed * (index * jnp.uint32(0x9E3779B0) + 1), dtype=jnp.uint32)
    return jnp.stack([first, second])


def combine(first: dict, second: dict) -> dict:
    """The inverse of `partition`. A leaf present in both is an error of the caller: ValueError."""
    merged = dict(first)
    for name, child in second.items():
        if name not in merged:
            merged[name] = child
        elif isinstance(merged[name], dict) and isinstance(child, dict):
            merged[name] = combine(merged[name], child)
        else:
            raise ValueError(f"the leaf {name!r} is in both trees")
    return merged


def global_norm(tree: PyTree) -> Array:
    """Square root of the sum of squares over every leaf, in float32."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves), jnp.float32(0)))


def parameter_count(tree: PyTree) -> int:
    """Number of scalars in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def byte_count(tree: PyTree) -> int:
    """Bytes of the whole tree, counted once however it is sharded."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
