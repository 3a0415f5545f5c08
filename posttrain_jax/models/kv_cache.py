"""The KV cache: every layer's keys and values of a row's tokens, at the indices 0, 1, 2 ... of the row.

Values lie as `[B, G, S, K]`. Keys lie in C = S / J blocks of J tokens, `[B, G, C, K, J]`, so that the product with a
query reads them in order: within a block the tokens are the last axis, and on a CPU a block of 64 x 64 stays in the
processor's cache while it is read (one block of all tokens takes twice as long, experiments/LOG.md). On other backends
all tokens are one block.

Prompts are prefilled into a cache of their own with all layers in one array (`init_prefill_cache`), and put into the
cache when they are complete (`put_rows`): so the prefill program does not depend on the length of the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.config import ModelConfig

CPU_BLOCK = 64  # J on a CPU
PREFILL_BLOCK = 256  # tokens of the prefill cache that attention reads together


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> PyTree:
    """An empty cache for at least `length` tokens a row.

    `layers`: for each layer `k` `[B, G, C, K, J]` and `v` `[B, G, S, K]`; `positions` `[B, S]`, each token's position
    (-1 = empty); `length` `[B]`, how many tokens a row holds. S is `length` rounded up to a multiple of J.
    """
    layers = init_layers(config, batch, length, dtype)
    return {
        "layers": layers,
        "positions": jnp.full((batch, layers[0]["v"].shape[2]), -1, jnp.int32),
        "length": jnp.zeros((batch,), jnp.int32),
    }


def init_layers(config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> list[PyTree]:
    """The `layers` of an empty cache."""
    groups, width = config.n_kv_heads, config.head_dim
    block = CPU_BLOCK if jax.default_backend() == "cpu" else length
    blocks = -(-length // block)
    return [
        {
            "k": jnp.zeros((batch, groups, blocks, width, block), dtype),
            "v": jnp.zeros((batch, groups, blocks * block, width), dtype),
        }
        for _ in range(config.n_layers)
    ]


def init_prefill_cache(config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> PyTree:
    """Room for the keys and values of B prompts in prefill, `k` and `v` `[L, B, S, G, K]`; S is `length` rounded up to
    a multiple of PREFILL_BLOCK."""
    size = -(-length // PREFILL_BLOCK) * PREFILL_BLOCK
    shape = (config.n_layers, batch, size, config.n_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def append(layer: PyTree, k_BTGK: Array, v_BTGK: Array, index_BT: Array) -> PyTree:
    """A layer with the keys and values of T tokens written, each at its index in the row (out of range = nowhere)."""
    block = layer["k"].shape[-1]

    def keys(k_GCKJ: Array, new_TGK: Array, index_T: Array) -> Array:
        new_TGK = new_TGK.astype(k_GCKJ.dtype)
        target = k_GCKJ.at[:, index_T // block, :, index_T % block]
        return target.set(new_TGK, mode="drop", unique_indices=True)

    def values(v_GSK: Array, new_TGK: Array, index_T: Array) -> Array:
        new_GTK = new_TGK.transpose(1, 0, 2).astype(v_GSK.dtype)
        return v_GSK.at[:, index_T].set(new_GTK, mode="drop", unique_indices=True)

    return {
        "k": jax.vmap(keys)(layer["k"], k_BTGK, index_BT),
        "v": jax.vmap(values)(layer["v"], v_BTGK, index_BT),
    }


def put_rows(layer: PyTree, k_RTGK: Array, v_RTGK: Array, row_R: Array) -> PyTree:
    """A layer with R sequences written to the start of some rows (out of range = nowhere); what lies behind them is
    undefined. Of sequences longer than the cache the first tokens are kept.
    """
    blocks, block = layer["k"].shape[2], layer["k"].shape[-1]
    time = min(k_RTGK.shape[1], blocks * block)
    v_RGTK = v_RTGK[:, :time].transpose(0, 2, 1, 3).astype(layer["v"].dtype)
    k_RTGK = jnp.pad(k_RTGK[:, :time], [(0, 0), (0, -time % block), (0, 0), (0, 0)])
    k_RCJGK = k_RTGK.reshape(k_RTGK.shape[0], -1, block, *k_RTGK.shape[2:])
    k_RGCKJ = k_RCJGK.transpose(0, 3, 1, 4, 2).astype(layer["k"].dtype)
    return {
        "k": layer["k"].at[row_R, :, : k_RGCKJ.shape[2]].set(k_RGCKJ, mode="drop"),
        "v": layer["v"].at[row_R, :, :time].set(v_RGTK, mode="drop"),
    }


def grow(layer: PyTree, length: int) -> PyTree:
    """The same layer with room for at least `length` tokens a row, no less than it has."""
    blocks, block = layer["k"].shape[2], layer["k"].shape[-1]
    keys, values = [(0, 0)] * 5, [(0, 0)] * 4
    if jax.default_backend() == "cpu":
        keys[2] = (0, -(-length // block) - blocks)
        values[2] = (0, keys[2][1] * block)
    else:
        keys[4] = values[2] = (0, length - block)
    return {"k": jnp.pad(layer["k"], keys), "v": jnp.pad(layer["v"], values)}
