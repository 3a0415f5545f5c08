"""The one decoder-only transformer: every family in `hf_config.FAMILIES` is this definition with other numbers.

Layers are scanned (one compiled body, parameters stacked on a leading L axis). Flax Linen stays inside this
folder; the rest of the code sees `Model.apply(params, tokens_BT, ...) -> ModelOutput`, a pure function.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import constrain_activations
from posttrain_jax.core.types import Array, ModelOutput, PyTree
from posttrain_jax.models.attention import (
    IMPLEMENTATIONS,
    AttentionMask,
    attend,
    attend_cache,
    attend_prefill,
    default_implementation,
)
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.kv_cache import append
from posttrain_jax.models.rope import apply_rope, rope_tables

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}

# From so many rows on, adding an adapter to its kernel costs less than adding its product to every row, and the
# weights of a product are read as they lie.
MANY_ROWS = 512

# What the backward pass finds saved; everything else of a layer it computes again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "elementwise": jax.checkpoint_policies.save_only_these_names(
        "query", "key", "value", "attention_out", "attention_normalizer", "residual", "gate", "up"
    ),
    "mlp": jax.checkpoint_policies.save_only_these_names(
        "query", "key", "value", "attention_out", "attention_normalizer", "residual"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (arXiv:1910.07467); `plus_one`: times 1 + scale."""

    eps: float
    plus_one: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        weight = scale + 1.0 if self.plus_one else scale
        return (normed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x `[..., in]` times kernel `[in, out]`.

    The gradient is written out so that XLA's CPU backend gets its two products as they should be: without the
    barrier it fuses the transpose that the kernel's gradient needs into the element-wise work before it and
    writes it with a stride (a quarter of a whole training step, experiments/LOG.md).
    """
    return x @ kernel


def _matmul_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_bwd(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    if jax.default_backend() == "cpu":
        x, d_y = jax.lax.optimization_barrier((x, d_y))
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_kernel = jnp.einsum("nd,nf->df", rows, d_rows, preferred_element_type=jnp.float32)
    return (d_rows @ kernel.T).reshape(x.shape), d_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lora_matmul(x: Array, kernel: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """x (W + scale A B): the adapter is added to the kernel, not its product to every token's output.

    With many rows that is one large product and no element-wise pass more than without an adapter, forward and
    backward; the gradients of A and B go through rows of width rank (arXiv:2106.09685, section 4). Exact in float32;
    in bfloat16 the sum would round small adapters away.
    """
    return x @ (kernel + scale * (lora_a @ lora_b))


def _lora_matmul_fwd(x, kernel, lora_a, lora_b, scale):
    return lora_matmul(x, kernel, lora_a, lora_b, scale), (x, kernel, lora_a, lora_b)


def _lora_matmul_bwd(scale, residuals, d_y):
    x, kernel, lora_a, lora_b = residuals
    d_x, d_kernel = _matmul_bwd((x, kernel + scale * (lora_a @ lora_b)), d_y)
    if jax.default_backend() == "cpu":
        x, d_y = jax.lax.optimization_barrier((x, d_y))
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_a = scale * jnp.einsum("nd,nr->dr", rows, d_rows @ lora_b.T)
    d_b = scale * jnp.einsum("nr,nf->rf", rows @ lora_a, d_rows)
    return d_x, d_kernel, d_a, d_b


lora_matmul.defvjp(_lora_matmul_fwd, _lora_matmul_bwd)


def few_rows_matmul(x: Array, kernel_out_in: Array, out_dtype: Any = None) -> Array:
    """x `[..., in]` times the kernel `[out, in]`, transposed; `out_dtype` None = that of the arguments.

    For a few rows XLA's CPU backend is fastest with the weights on the left (8 rows: 22 against 32 ms for the MLPs of
    SmolLM2-135M, experiments/LOG.md); without the barriers it would turn the product around.
    """
    rows_IN = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    product = jnp.matmul(kernel_out_in, rows_IN, preferred_element_type=out_dtype)
    return jax.lax.optimization_barrier(product).T.reshape(*x.shape[:-1], -1)


class Linear(nn.Module):
    """x W (+ b) (+ scale * (x A) B when LoRA targets this layer)."""

    features: int
    use_bias: bool
    lora: LoraConfig | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_variable(
            "params", "kernel_out_in"
        ):  # `decode_layers` has turned it and merged the adapter
            y = few_rows_matmul(x, self.get_variable("params", "kernel_out_in").astype(self.dtype))
        else:
            y = self._many_rows(x)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _many_rows(self, x: Array) -> Array:
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(0.02), (width, self.features), jnp.float32)
        if self.lora is None:
            return matmul(x, kernel.astype(self.dtype))
        rank = self.lora.rank
        a_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        lora_a = self.param("lora_a", a_init, (width, rank), jnp.float32)
        lora_b = self.param("lora_b", nn.initializers.zeros, (rank, self.features), jnp.float32)
        if x.size // width >= MANY_ROWS and jnp.dtype(self.dtype) == jnp.float32:
            return lora_matmul(x, kernel, lora_a, lora_b, self.lora.scale)
        update = matmul(matmul(x, lora_a.astype(self.dtype)), lora_b.astype(self.dtype))
        return matmul(x, kernel.astype(self.dtype)) + self.lora.scale * update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """What every layer reads and none changes.

    Attributes:
      mask: who may attend to whom.
      rope_global, rope_local: (cos, sin) tables, each `[B, T, K // 2]` float32.
      cache_index_BT: where in the cache each token of this call is written (out of range = nowhere), or None.
      start: the place of this call's first token in what is being read (`read`), or None.
    """

    mask: AttentionMask
    rope_global: tuple[Array, Array]
    rope_local: tuple[Array, Array]
    cache_index_BT: Array | None = None
    start: Array | None = None


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with RoPE and an optional KV cache."""

    config: ModelConfig
    lora: LoraConfig
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(
        self, x_BTD: Array, shared: Shared, is_local: Array, cache: dict[str, Array] | None
    ) -> tuple[Array, dict[str, Array] | None]:
        """The update of the residual stream, and the cache, if there is one, with the new keys and values written."""
        config = self.config
        batch, time, _ = x_BTD.shape

        heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
        widths = {name: count * config.head_dim for name, count in heads.items()}

        def project(name: str) -> Array:
            lora = self.lora if self.lora.rank and name in self.lora.targets else None
            return Linear(widths[name], config.qkv_bias, lora, self.dtype, name=name)(x_BTD)

        if self.has_variable("params", "qkv"):  # `decode_layers` has joined them
            joined = Linear(sum(widths.values()), config.qkv_bias, None, self.dtype, name="qkv")(x_BTD)
            parts = jnp.split(joined, list(itertools.accumulate(widths.values()))[:-1], axis=-1)
        else:
            parts = [project(name) for name in heads]
        q_BTHK, k_BTGK, v_BTGK = (
            part.reshape(batch, time, count, config.head_dim)
            for part, count in zip(parts, heads.values(), strict=True)
        )
        if config.qk_norm:
            q_BTHK = RMSNorm(config.norm_eps, config.norm_plus_one, self.dtype, name="q_norm")(q_BTHK)
            k_BTGK = RMSNorm(config.norm_eps, config.norm_plus_one, self.dtype, name="k_norm")(k_BTGK)
        cos, sin = shared.rope_global
        if config.any_local:
            cos, sin = (
                jnp.where(is_local, local, whole)
                for local, whole in zip(shared.rope_local, shared.rope_global, strict=True)
            )
        q_BTHK = apply_rope(q_BTHK, cos, sin)
        k_BTGK = apply_rope(k_BTGK, cos, sin)

        if cache is not None and shared.start is not None:  # `read`: all layers in one array
            at = (cache["layer"], 0, shared.start, 0, 0)
            cache = {
                "k": jax.lax.dynamic_update_slice(cache["k"], k_BTGK[None].astype(cache["k"].dtype), at),
                "v": jax.lax.dynamic_update_slice(cache["v"], v_BTGK[None].astype(cache["v"].dtype), at),
                "layer": cache["layer"],
            }
            out_BTHK = attend_prefill(
                q_BTHK,
                cache["k"],
                cache["v"],
                layer=cache["layer"],
                start=shared.start,
                is_local=is_local,
                config=config,
            )
        elif cache is not None:
            assert shared.cache_index_BT is not None  # `extend` gives both
            cache = append(cache, k_BTGK, v_BTGK, shared.cache_index_BT)
            out_BTHK = attend_cache(
                q_BTHK,
                cache["k"].astype(self.dtype),
                cache["v"].astype(self.dtype),
                mask=shared.mask,
                is_local=is_local,
                config=config,
            )
        else:
            out_BTHK = attend(
                checkpoint_name(q_BTHK, "query"),
                checkpoint_name(k_BTGK, "key"),
                checkpoint_name(v_BTGK, "value"),
                mask=shared.mask,
                is_local=is_local,
                config=config,
                implementation=self.implementation,
            )
        out_BTD = out_BTHK.reshape(batch, time, config.n_heads * config.head_dim)
        lora = self.lora if self.lora.rank and "o" in self.lora.targets else None
        return Linear(config.d_model, config.o_bias, lora, self.dtype, name="o")(out_BTD), cache


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202)."""

    config: ModelConfig
    lora: LoraConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        config = self.config

        def linear(name: str, features: int) -> Linear:
            lora = self.lora if self.lora.rank and name in self.lora.targets else None
            return Linear(features, config.mlp_bias, lora, self.dtype, name=name)

        if self.has_variable("params", "gate_up"):  # `decode_layers` has joined them
            joined = Linear(2 * config.d_ff, config.mlp_bias, None, self.dtype, name="gate_up")(x_BTD)
            gate_BTF, up_BTF = jnp.split(joined, 2, axis=-1)
        else:
            gate_BTF = checkpoint_name(linear("gate", config.d_ff)(x_BTD), "gate")
            up_BTF = checkpoint_name(linear("up", config.d_ff)(x_BTD), "up")
        return linear("down", config.d_model)(ACTIVATIONS[config.activation](gate_BTF) * up_BTF)


class Block(nn.Module):
    """One layer: attention and MLP, each with its norm(s) and residual add."""

    config: ModelConfig
    lora: LoraConfig
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(
        self, x_BTD: Array, shared: Shared, is_local: Array, cache: dict[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array] | None]:
        """The new residual stream, and the cache as `Attention` leaves it."""
        config = self.config

        def norm(name: str) -> RMSNorm:
            return RMSNorm(config.norm_eps, config.norm_plus_one, self.dtype, name=name)

        attention = Attention(config, self.lora, self.dtype, self.implementation, name="attn")
        update_BTD, cache = attention(norm("attn_norm")(x_BTD), shared, is_local, cache)
        if config.sandwich_norms:
            update_BTD = norm("post_attn_norm")(update_BTD)
        x_BTD = checkpoint_name(constrain_activations(x_BTD + update_BTD), "residual")
        update_BTD = GatedMLP(config, self.lora, self.dtype, name="mlp")(norm("mlp_norm")(x_BTD))
        if config.sandwich_norms:
            update_BTD = norm("post_mlp_norm")(update_BTD)
        return constrain_activations(x_BTD + update_BTD), cache


class Embedding(nn.Module):
    """Token ids to vectors, `[B, T] -> [B, T, D]`."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, tokens_BT: Array) -> Array:
        shape = (self.config.vocab_size, self.config.d_model)
        table_VD = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(self.dtype)
        return x_BTD * jnp.asarray(self.config.embed_scale, self.dtype)


class Head(nn.Module):
    """Holds the untied vocabulary projection, so that `init` makes it; `head_VD` is how it is read."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.config.vocab_size, self.config.d_model)
        return self.param("kernel", nn.initializers.normal(0.02), shape, jnp.float32)


class Transformer(nn.Module):
    """Tokens to final hidden states; the vocabulary projection is not part of it (see `models/heads.py`)."""

    config: ModelConfig
    lora: LoraConfig
    dtype: Any
    implementation: str
    remat: str

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segment_ids_BT: Array,
        branches_BT: Array | None = None,
    ) -> Array:
        """The hidden states."""
        config = self.config
        x_BTD = constrain_activations(Embedding(config, self.dtype, name="embed")(tokens_BT))
        if not config.tied_embeddings and self.is_initializing():
            Head(config, name="head")()
        shared = Shared(
            mask=AttentionMask.packed_rows(segment_ids_BT, positions_BT, branches_BT),
            rope_global=rope_tables(positions_BT, config.head_dim, config.rope),
            rope_local=rope_tables(positions_BT, config.head_dim, config.rope_local),
        )
        layers = nn.scan(
            nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=config.n_layers,
        )(config, self.lora, self.dtype, self.implementation, name="layers")
        x_BTD, _ = layers(x_BTD, shared, jnp.asarray(_local_layers(config)))
        norm = RMSNorm(config.norm_eps, config.norm_plus_one, self.dtype, name="final_norm")
        return norm(x_BTD)


def extend(
    module: Transformer,
    params: PyTree,
    tokens_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    cache: PyTree,
) -> tuple[Array, PyTree]:
    """The same layers over a KV cache, one after the other (not scanned: each writes its own cache in place,
    and XLA copies neither that nor the layer's weights if these are `decode_layers`)."""
    config = module.config
    batch, size = cache["positions"].shape
    real_BT = (segment_ids_BT != 0).astype(jnp.int32)
    index_BT = cache["length"][:, None] + jnp.cumsum(real_BT, axis=1) - 1
    index_BT = jnp.where(real_BT == 1, index_BT, size)
    rows = jnp.arange(batch)[:, None]
    positions_BS = cache["positions"].at[rows, index_BT].set(positions_BT, mode="drop")
    shared = Shared(
        mask=AttentionMask.cached(positions_BT, positions_BS),
        rope_global=_written(rope_tables(positions_BT, config.head_dim, config.rope)),
        rope_local=_written(rope_tables(positions_BT, config.head_dim, config.rope_local)),
        cache_index_BT=index_BT,
    )
    block = Block(config, module.lora, module.dtype, module.implementation)
    x_BTD = constrain_activations(
        Embedding(config, module.dtype).apply({"params": params["embed"]}, tokens_BT)
    )
    layers = []
    for number, is_local in enumerate(_local_layers(config)):
        weights = {"params": _layer(params["layers"], number)}
        x_BTD, layer = block.apply(weights, x_BTD, shared, jnp.asarray(is_local), cache["layers"][number])
        layers.append(layer)
    norm = RMSNorm(config.norm_eps, config.norm_plus_one, module.dtype)
    x_BTD = norm.apply({"params": params["final_norm"]}, x_BTD)
    length_B = cache["length"] + jnp.sum(real_BT, axis=1)
    return x_BTD, {"layers": layers, "positions": positions_BS, "length": length_B}


def prefill(
    module: Transformer, params: PyTree, tokens_BT: Array, start: Array, cache: PyTree
) -> tuple[Array, PyTree]:
    """The same layers, scanned, over T further tokens of B prompts; see `Model.prefill`."""
    config = module.config
    positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    positions_BT = positions_BT.astype(jnp.int32)
    shared = Shared(
        mask=AttentionMask.packed_rows(jnp.ones_like(positions_BT), positions_BT),
        rope_global=rope_tables(positions_BT, config.head_dim, config.rope),
        rope_local=rope_tables(positions_BT, config.head_dim, config.rope_local),
        start=start,
    )
    block = Block(config, module.lora, module.dtype, module.implementation)

    def one_layer(carry: tuple[Array, PyTree], layer: PyTree) -> tuple[tuple[Array, PyTree], None]:
        x_BTD, cache = carry
        cache = {**cache, "layer": layer["number"]}
        x_BTD, cache = block.apply({"params": layer["weights"]}, x_BTD, shared, layer["is_local"], cache)
        return (x_BTD, {"k": cache["k"], "v": cache["v"]}), None

    x_BTD = constrain_activations(
        Embedding(config, module.dtype).apply({"params": params["embed"]}, tokens_BT)
    )
    layers = {
        "weights": params["layers"],
        "number": jnp.arange(config.n_layers),
        "is_local": jnp.asarray(_local_layers(config)),
    }
    (x_BTD, cache), _ = jax.lax.scan(one_layer, (x_BTD, cache), layers)
    norm = RMSNorm(config.norm_eps, config.norm_plus_one, module.dtype)
    return norm.apply({"params": params["final_norm"]}, x_BTD), cache


def _written(tables: tuple[Array, Array]) -> tuple[Array, Array]:
    """The same tables, as XLA's CPU backend computes them once: it would fuse their cosines into whatever reads them in
    every layer, but a product, here with the identity, it fuses into nothing (experiments/LOG.md)."""
    if jax.default_backend() != "cpu":
        return tables
    cos, sin = (table @ jnp.eye(table.shape[-1], dtype=table.dtype) for table in tables)
    return cos, sin


def _local_layers(config: ModelConfig) -> tuple[bool, ...]:
    return tuple(config.local_layers) or (False,) * config.n_layers


def _layer(layers: PyTree, number: int) -> PyTree:
    """One layer's parameters, of stacked ones or of `decode_layers`."""
    return layers[number] if isinstance(layers, list) else jax.tree.map(lambda leaf: leaf[number], layers)


def decode_layers(layers: PyTree, lora_scale: float) -> list[PyTree]:
    """A copy of the layers' parameters as XLA's CPU backend reads them fastest for a few rows: one tree a layer
    instead of one of stacked leaves; kernels as `kernel_out_in` (see `few_rows_matmul`) with their adapters added
    (`lora_scale` times A B, in float32: for a model that computes in float32, as bfloat16 would round small adapters
    away); q, k, v joined as `qkv`, gate and up as `gate_up`. `extend` takes it in place of
    `params["layers"]`."""

    def turned(linear: PyTree) -> PyTree:
        kernel = linear["kernel"]
        if "lora_a" in linear:
            a, b = (linear[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
            kernel = kernel.astype(jnp.float32) + lora_scale * (a @ b)
        return {"kernel_out_in": kernel.T, **({"bias": linear["bias"]} if "bias" in linear else {})}

    def joined(part: PyTree, names: tuple[str, ...]) -> PyTree:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(turned(part[name]) for name in names))

    def rest(part: PyTree, *names: str) -> PyTree:
        return {name: value for name, value in part.items() if name not in names}

    def decode_layer(layer: PyTree) -> PyTree:
        attn, mlp = layer["attn"], layer["mlp"]
        qkv, o = joined(attn, ("q", "k", "v")), turned(attn["o"])
        gate_up, down = joined(mlp, ("gate", "up")), turned(mlp["down"])
        return {
            **layer,
            "attn": {**rest(attn, "q", "k", "v"), "qkv": qkv, "o": o},
            "mlp": {"gate_up": gate_up, "down": down},
        }

    count = jax.tree.leaves(layers)[0].shape[0]
    return [decode_layer(_layer(layers, number)) for number in range(count)]


@dataclasses.dataclass(frozen=True)
class Model:
    """The transformer as pure functions of its parameters (plain nested dicts). Made by `make_model`."""

    config: ModelConfig
    lora: LoraConfig
    dtype: str
    module: Transformer

    def init(self, key: Array) -> PyTree:
        """Random float32 parameters: normal(0, 0.02) matrices, identity norms, LoRA B zero."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        return self.module.init(key, tokens, tokens, tokens + 1)["params"]

    def abstract_params(self) -> PyTree:
        """Shapes and dtypes of the parameters, without making them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(
        self,
        params: PyTree,
        tokens_BT: Array,
        *,
        segment_ids_BT: Array | None = None,
        positions_BT: Array | None = None,
        branches_BT: Array | None = None,
        cache: PyTree | None = None,
        logits: bool = True,
    ) -> ModelOutput:
        """Runs the decoder.

        Args:
          params: the parameter tree.
          tokens_BT: int32 token ids.
          segment_ids_BT: 0 = padding; tokens attend only within their own segment. Default: all ones.
          positions_BT: position of each token in its sequence; default: 0, 1, ... in the row (after what the
            cache already holds). Packed rows must say.
          branches_BT: completions that share their segment's prompt (branch 0): a token of branch b sees the prompt
            and b alone. Positions go on after the prompt in every branch. Not with a cache.
          cache: from `kv_cache.init_cache`; the real tokens are appended to each row. Segments cannot be packed in
            a cache.
          logits: also project all positions on the vocabulary, `[B, T, V]` float32. For notebooks, parity
            and decoding; train steps use `heads.token_logps`, which never holds such an array.
        """
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
            if cache is not None:
                positions_BT = positions_BT + cache["length"][:, None]
        positions_BT = positions_BT.astype(jnp.int32)
        if cache is None:
            hidden_BTD = self.module.apply(
                {"params": params}, tokens_BT, positions_BT, segment_ids_BT, branches_BT
            )
        else:
            hidden_BTD, cache = extend(self.module, params, tokens_BT, positions_BT, segment_ids_BT, cache)
        return ModelOutput(
            hidden_BTD=hidden_BTD,
            logits_BTV=self.logits(params, hidden_BTD) if logits else None,
            cache=cache,
        )

    def prefill(
        self, params: PyTree, tokens_BT: Array, *, start: Array, cache: PyTree
    ) -> tuple[Array, PyTree]:
        """Reads T further tokens of B prompts, all from index `start` on. Returns the hidden states `[B, T, D]` and the
        cache with their keys and values. Both are undefined behind a prompt's end.

        Args:
          params: stacked layers, as they are trained.
          tokens_BT: int32 token ids; `start + T` is at most the length of the cache.
          start: int32 scalar; the tokens before it were read by earlier calls.
          cache: as from `kv_cache.init_prefill_cache`.
        """
        return prefill(self.module, params, tokens_BT, start, cache)

    def logits(self, params: PyTree, hidden_BTD: Array) -> Array:
        """Float32 logits `[..., V]` of hidden states `[..., D]`, soft-capped where the family does."""
        head = head_VD(params).astype(hidden_BTD.dtype)
        if jax.default_backend() == "cpu" and hidden_BTD.size // hidden_BTD.shape[-1] < MANY_ROWS:
            logits = few_rows_matmul(hidden_BTD, head, jnp.float32)
        else:
            logits = jnp.einsum("...d,vd->...v", hidden_BTD, head, preferred_element_type=jnp.float32)
        cap = self.config.logits_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits


def head_VD(params: PyTree) -> Array:
    """The vocabulary projection, `[V, D]`: the tied embedding or the head of its own.

    Raises:
      InputError: the parameters are a reward model's, which has none.
    """
    if "score_head" in params:
        raise InputError("A reward model gives scores, no next token; give a language model instead.")
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"]


def make_model(
    config: ModelConfig,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    remat: str = "elementwise",
    lora: LoraConfig | None = None,
) -> Model:
    """A `Model` for a config.

    Args:
      config: the decoder's numbers.
      dtype: compute dtype, "float32" or "bfloat16"; parameters stay float32.
      attention: "xla", "cudnn" (GPU), "splash" (TPU), or "auto": what suits the platform and the model.
      remat: what the backward pass computes again: "none", "elementwise" (norms, RoPE, activations: no matrix
        product but attention's), "mlp" (the MLP too), "full" (each layer from its input).
      lora: adapters to add to the linear layers.

    Raises:
      InputError: an unknown name, or an attention implementation that cannot do what the config needs.
    """
    if remat not in REMAT_POLICIES:
        raise InputError(f"train.remat is {remat!r}, which is not one of {', '.join(REMAT_POLICIES)}.")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype is {dtype!r}; use float32 or bfloat16.")
    if attention == "auto":
        attention = default_implementation(config, dtype)
    if attention not in IMPLEMENTATIONS:
        raise InputError(f"model.attention is {attention!r}; use auto, {', '.join(IMPLEMENTATIONS)}.")
    lora = lora or LoraConfig()
    module = Transformer(config, lora, jnp.dtype(dtype), attention, remat)
    return Model(config=config, lora=lora, dtype=dtype, module=module)
