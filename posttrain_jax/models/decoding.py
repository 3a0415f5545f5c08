"""The transformer over a KV cache: `prefill` reads prompts, `extend` appends tokens.

Both run the layers of `layers.py` with the parameters that training uses; on a CPU `extend` is faster with those that
`decode_layers` makes of them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from posttrain_jax.core.sharding import constrain_activations
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.attention_mask import AttentionMask
from posttrain_jax.models.kernels.matmul import computed_once
from posttrain_jax.models.layers import Block, Embedding, LayerInputs, RMSNorm


def extend(
    block: Block,
    params: PyTree,
    tokens_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    cache: PyTree,
) -> tuple[Array, PyTree]:
    """Appends T tokens to each row of a cache (those of segment 0 are skipped): their hidden states, and the cache.

    The layers run one after the other and are not scanned: each writes its own cache in place, and XLA copies neither
    the cache nor, with `decode_layers`, the layer's weights.
    """
    config = block.config
    batch, size = cache["positions"].shape
    real_BT = (segment_ids_BT != 0).astype(jnp.int32)
    index_BT = cache["length"][:, None] + jnp.cumsum(real_BT, axis=1) - 1
    index_BT = jnp.where(real_BT == 1, index_BT, size)
    rows = jnp.arange(batch)[:, None]
    positions_BS = cache["positions"].at[rows, index_BT].set(positions_BT, mode="drop")
    mask = AttentionMask.cached(positions_BT, positions_BS)
    inputs = LayerInputs.of(config, mask, positions_BT, cache_index_BT=index_BT)
    inputs = dataclasses.replace(
        inputs, rope_global=computed_once(inputs.rope_global), rope_local=computed_once(inputs.rope_local)
    )
    x_BTD = _embed(block, params, tokens_BT)
    layers = []
    for number, is_local in enumerate(config.layer_is_local):
        weights = {"params": _layer(params["layers"], number)}
        x_BTD, layer = block.apply(weights, x_BTD, inputs, jnp.asarray(is_local), cache["layers"][number])
        layers.append(layer)
    length_B = cache["length"] + jnp.sum(real_BT, axis=1)
    return _final_norm(block, params, x_BTD), {
        "layers": layers,
        "positions": positions_BS,
        "length": length_B,
    }


def prefill(
    block: Block, params: PyTree, tokens_BT: Array, start: Array, cache: PyTree
) -> tuple[Array, PyTree]:
    """Reads T further tokens of B prompts with scanned layers; see `Model.prefill`."""
    config = block.config
    positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    positions_BT = positions_BT.astype(jnp.int32)
    mask = AttentionMask.packed_rows(jnp.ones_like(positions_BT), positions_BT)
    inputs = LayerInputs.of(config, mask, positions_BT, start=start)

    def one_layer(carry: tuple[Array, PyTree], layer: PyTree) -> tuple[tuple[Array, PyTree], None]:
        x_BTD, cache = carry
        cache = {**cache, "layer": layer["number"]}
        x_BTD, cache = block.apply({"params": layer["weights"]}, x_BTD, inputs, layer["is_local"], cache)
        return (x_BTD, {"k": cache["k"], "v": cache["v"]}), None

    layers = {
        "weights": params["layers"],
        "number": jnp.arange(config.n_layers),
        "is_local": jnp.asarray(config.layer_is_local),
    }
    x_BTD = _embed(block, params, tokens_BT)
    (x_BTD, cache), _ = jax.lax.scan(one_layer, (x_BTD, cache), layers)
    return _final_norm(block, params, x_BTD), cache


def _embed(block: Block, params: PyTree, tokens_BT: Array) -> Array:
    embedding = Embedding(block.config, block.dtype)
    return constrain_activations(embedding.apply({"params": params["embed"]}, tokens_BT))


def _final_norm(block: Block, params: PyTree, x_BTD: Array) -> Array:
    return RMSNorm(block.config, block.dtype).apply({"params": params["final_norm"]}, x_BTD)


def _layer(layers: PyTree, number: int) -> PyTree:
    """One layer's parameters, out of stacked ones or out of `decode_layers`."""
    return layers[number] if isinstance(layers, list) else jax.tree.map(lambda leaf: leaf[number], layers)


def decode_layers(layers: PyTree, lora_scale: float) -> list[PyTree]:
    """A copy of the layers' parameters in the layout that XLA's CPU backend reads fastest for a few rows.

    `extend` takes it in place of `params["layers"]`. It is one tree a layer instead of one tree of stacked leaves;
    kernels are transposed (`kernel_out_in`, see `few_rows_matmul`), with their adapters added (`lora_scale` times A B,
    in float32: for a model that computes in float32, as bfloat16 would round small adapters away); q, k and v are
    joined as `qkv`, gate and up as `gate_up`.
    """

    def transposed(linear: PyTree) -> PyTree:
        kernel = linear["kernel"]
        if "lora_a" in linear:
            a, b = (linear[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
            kernel = kernel.astype(jnp.float32) + lora_scale * (a @ b)
        return {"kernel_out_in": kernel.T, **({"bias": linear["bias"]} if "bias" in linear else {})}

    def joined(part: PyTree, names: tuple[str, ...]) -> PyTree:
        return jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves), *(transposed(part[name]) for name in names)
        )

    def rest(part: PyTree, *names: str) -> PyTree:
        return {name: value for name, value in part.items() if name not in names}

    def decode_layer(layer: PyTree) -> PyTree:
        attn, mlp = layer["attn"], layer["mlp"]
        qkv, o = joined(attn, ("q", "k", "v")), transposed(attn["o"])
        gate_up, down = joined(mlp, ("gate", "up")), transposed(mlp["down"])
        return {
            **layer,
            "attn": {**rest(attn, "q", "k", "v"), "qkv": qkv, "o": o},
            "mlp": {"gate_up": gate_up, "down": down},
        }

    count = jax.tree.leaves(layers)[0].shape[0]
    return [decode_layer(_layer(layers, number)) for number in range(count)]
