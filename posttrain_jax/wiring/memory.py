"""How much memory a step needs beside its state, by formulas of the model's sizes (bytes on each device).

Per token of a micro-batch and layer, the forward pass keeps for the backward pass (`train.remat`; D, H, G, K, F as in
`core/types.py`, one element of the compute dtype each):

    full          D                                         the residual stream
    mlp           2 D + 2 H K + 2 G K                       and query, key, value, attention's output, its residual
    elementwise   2 D + 2 H K + 2 G K + 2 F                 and the MLP's gate and up
    none          8 D + 4 H K + 4 G K + 5 F                 and what norms, RoPE and activations give

The backward pass of one layer works on about as much again as "none" keeps of a layer. The vocabulary's projection is
computed chunk by chunk (`losses/logprobs.py`): three float32 arrays of a chunk's logits, three of the hidden states.
"""

from __future__ import annotations

from jax.sharding import Mesh

from posttrain_jax.losses.logprobs import chunk_rows
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.transformer import Model


def kept_per_token(config: ModelConfig, remat: str, tensor: int = 1) -> int:
    """Elements that a layer keeps of a token for the backward pass, on one of the devices that split heads and the
    MLP's width between them."""
    queries, keys = (_share(n, tensor) * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    width = _share(config.d_ff, tensor)
    attention = 2 * config.d_model + 2 * queries + 2 * keys
    return {
        "full": config.d_model,
        "mlp": attention,
        "elementwise": attention + 2 * width,
        "none": 8 * config.d_model + 4 * queries + 4 * keys + 5 * width,
    }[remat]


def activation_bytes(model: Model, mesh: Mesh, *, rows: int, length: int) -> int:
    """Of a forward and a backward pass over a micro-batch.

    Args:
      model: with its remat policy and compute dtype.
      mesh: rows are split over data and fsdp; heads and the MLP's width over tensor.
      rows: of a micro-batch, all devices together.
      length: tokens of a row.
    """
    config, itemsize = model.config, model.module.dtype.itemsize
    tokens, tensor = -(-rows // (mesh.shape["data"] * mesh.shape["fsdp"])) * length, mesh.shape["tensor"]
    kept = config.n_layers * kept_per_token(config, model.module.remat, tensor)
    kept += kept_per_token(config, "none", tensor)
    logits = chunk_rows(tokens, config.vocab_size) * config.vocab_size
    return tokens * kept * itemsize + 3 * 4 * (logits + tokens * config.d_model)


def cache_bytes(model: Model, mesh: Mesh, *, rows: int, length: int) -> int:
    """Of the engine's KV cache: keys and values of every layer, for rows that are written side by side."""
    config, itemsize = model.config, model.module.dtype.itemsize
    rows = -(-rows // (mesh.shape["data"] * mesh.shape["fsdp"]))
    heads = _share(config.n_kv_heads, mesh.shape["tensor"])
    return 2 * config.n_layers * rows * length * heads * config.head_dim * itemsize


def _share(count: int, devices: int) -> int:
    """Of so many heads or columns those of one device; all where they do not divide."""
    return count // devices if count % devices == 0 else count
