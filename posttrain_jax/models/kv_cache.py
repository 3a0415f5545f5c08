"""The KV cache: every layer's keys and values of the tokens that were read, at places 0, 1, 2 ... of each row.

Values lie as `[B, G, S, K]`. Keys lie in C = S / J blocks of J places, `[B, G, C, K, J]`, so that the product with a
query reads them in order: within a block the places are side by side, and on a CPU a block of 64 x 64 is in cache while
it is read (one block of all places takes twice as long, experiments/LOG.md). Elsewhere all places are one block.

Prompts are read into an `init_reading` of their own, all layers in one array, and put into the cache when they are
whole (`put_rows`): so what reads does not depend on the size of the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.config import ModelConfig

CPU_BLOCK = 64
READ_BLOCK = 256


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> PyTree:
    """An empty cache of at least `length` places a row.

    `layers`: for each layer `k` `[B, G, C, K, J]` and `v` `[B, G, S, K]`; `positions` `[B, S]` (-1 = empty); `length`
    `[B]`, how many places of a row are taken. S is the next multiple of the blocks' width J.
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


def init_reading(config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> PyTree:
    """Room for the keys and values of B prompts that are being read, `k` and `v` `[L, B, S, G, K]`; S is the next
    multiple of the READ_BLOCK places that attention looks at together."""
    places = -(-length // READ_BLOCK) * READ_BLOCK
    shape = (config.n_layers, batch, places, config.n_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def append(layer: PyTree, k_BTGK: Array, v_BTGK: Array, index_BT: Array) -> PyTree:
    """A layer with the keys and values of T tokens written, each at its place in the row (out of range = nowhere)."""
    block = layer["k"].shape[-1]

    def keys(k_GCKJ: Array, new_TGK: Array, index_T: Array) -> Array:
        new_TGK = new_TGK.astype(k_GCKJ.dtype)
        at = k_GCKJ.at[:, index_T // block, :, index_T % block]
        return at.set(new_TGK, mode="drop", unique_indices=True)

    def values(v_GSK: Array, new_TGK: Array, index_T: Array) -> Array:
        new_GTK = new_TGK.transpose(1, 0, 2).astype(v_GSK.dtype)
        return v_GSK.at[:, index_T].set(new_GTK, mode="drop", unique_indices=True)

    return {
        "k": jax.vmap(keys)(layer["k"], k_BTGK, index_BT),
        "v": jax.vmap(values)(layer["v"], v_BTGK, index_BT),
    }


def put_rows(layer: PyTree, k_RTGK: Array, v_RTGK: Array, row_R: Array) -> PyTree:
    """A layer in which some rows (out of range = nowhere) begin with R sequences; what lies behind them is undefined.

    Of sequences longer than the cache the first places are kept.
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
    """The same layer with at least `length` places a row, which is not less than it has."""
    blocks, block = layer["k"].shape[2], layer["k"].shape[-1]
    keys, values = [(0, 0)] * 5, [(0, 0)] * 4
    if jax.default_backend() == "cpu":
        keys[2] = (0, -(-length // block) - blocks)
        values[2] = (0, keys[2][1] * block)
    else:
        keys[4] = values[2] = (0, length - block)
    return {"k": jnp.pad(layer["k"], keys), "v": jnp.pad(layer["v"], values)}
