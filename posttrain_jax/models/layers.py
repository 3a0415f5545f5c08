"""The layers of the transformer: norm, linear layer, attention, gated MLP, block, embedding."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core.sharding import constrain_activations
from posttrain_jax.core.types import Array
from posttrain_jax.models.attention import attend
from posttrain_jax.models.attention_mask import AttentionMask
from posttrain_jax.models.cached_attention import append_and_attend, prefill_and_attend
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.kernels.matmul import MANY_ROWS, few_rows_matmul, lora_matmul, matmul
from posttrain_jax.models.rope import apply_rope, rope_tables

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (arXiv:1910.07467); times 1 + scale with `norm_plus_one`."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        plus_one = self.config.norm_plus_one
        init = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.config.norm_eps)
        weight = scale + 1.0 if plus_one else scale
        return (normed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class Linear(nn.Module):
    """x W (+ b) (+ scale * (x A) B when LoRA targets this layer)."""

    features: int
    use_bias: bool
    lora: LoraConfig | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_variable("params", "kernel_out_in"):  # from `decode_layers`, which merged the adapter too
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
class LayerInputs:
    """What all layers read.

    Attributes:
      mask: which keys a query may attend to.
      rope_global, rope_local: (cos, sin) tables of global and of sliding-window layers, each `[B, T, K // 2]` float32.
      cache_index_BT: `extend` only: the index in the cache of each token of this call (out of range = not written).
      start: `prefill` only: the index in the prompts of this call's first token.
    """

    mask: AttentionMask
    rope_global: tuple[Array, Array]
    rope_local: tuple[Array, Array]
    cache_index_BT: Array | None = None
    start: Array | None = None

    @staticmethod
    def of(
        config: ModelConfig,
        mask: AttentionMask,
        positions_BT: Array,
        *,
        cache_index_BT: Array | None = None,
        start: Array | None = None,
    ) -> LayerInputs:
        """The inputs of a call whose tokens stand at `positions_BT`."""
        return LayerInputs(
            mask,
            rope_global=rope_tables(positions_BT, config.head_dim, config.rope),
            rope_local=rope_tables(positions_BT, config.head_dim, config.rope_local),
            cache_index_BT=cache_index_BT,
            start=start,
        )


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with RoPE and an optional KV cache."""

    config: ModelConfig
    lora: LoraConfig
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(
        self, x_BTD: Array, inputs: LayerInputs, is_local: Array, cache: dict[str, Array] | None
    ) -> tuple[Array, dict[str, Array] | None]:
        """The update of the residual stream, and the cache, if there is one, with the new keys and values written."""
        config = self.config
        batch, time, _ = x_BTD.shape

        heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
        widths = {name: count * config.head_dim for name, count in heads.items()}

        def linear(name: str, features: int, use_bias: bool) -> Linear:
            return Linear(features, use_bias, self.lora.of_layer(name), self.dtype, name=name)

        if self.has_variable("params", "qkv"):  # joined by `decode_layers`
            joined = linear("qkv", sum(widths.values()), config.qkv_bias)(x_BTD)
            parts = jnp.split(joined, list(itertools.accumulate(widths.values()))[:-1], axis=-1)
        else:
            parts = [linear(name, widths[name], config.qkv_bias)(x_BTD) for name in heads]
        q_BTHK, k_BTGK, v_BTGK = (
            part.reshape(batch, time, count, config.head_dim)
            for part, count in zip(parts, heads.values(), strict=True)
        )
        if config.qk_norm:
            q_BTHK = RMSNorm(config, self.dtype, name="q_norm")(q_BTHK)
            k_BTGK = RMSNorm(config, self.dtype, name="k_norm")(k_BTGK)
        cos, sin = inputs.rope_global
        if config.any_local:
            cos, sin = (
                jnp.where(is_local, local_table, global_table)
                for local_table, global_table in zip(inputs.rope_local, inputs.rope_global, strict=True)
            )
        q_BTHK = apply_rope(q_BTHK, cos, sin)
        k_BTGK = apply_rope(k_BTGK, cos, sin)

        if cache is None:
            out_BTHK = attend(
                checkpoint_name(q_BTHK, "query"),
                checkpoint_name(k_BTGK, "key"),
                checkpoint_name(v_BTGK, "value"),
                mask=inputs.mask,
                is_local=is_local,
                config=config,
                implementation=self.implementation,
            )
        elif inputs.start is not None:
            out_BTHK, cache = prefill_and_attend(
                q_BTHK, k_BTGK, v_BTGK, cache, start=inputs.start, is_local=is_local, config=config
            )
        else:
            assert inputs.cache_index_BT is not None  # `extend` gives it
            out_BTHK, cache = append_and_attend(
                q_BTHK,
                k_BTGK,
                v_BTGK,
                cache,
                inputs.cache_index_BT,
                mask=inputs.mask,
                is_local=is_local,
                config=config,
            )
        out_BTD = out_BTHK.reshape(batch, time, config.n_heads * config.head_dim)
        return linear("o", config.d_model, config.o_bias)(out_BTD), cache


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202)."""

    config: ModelConfig
    lora: LoraConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        config = self.config

        def linear(name: str, features: int) -> Linear:
            return Linear(features, config.mlp_bias, self.lora.of_layer(name), self.dtype, name=name)

        if self.has_variable("params", "gate_up"):  # joined by `decode_layers`
            joined = linear("gate_up", 2 * config.d_ff)(x_BTD)
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
        self, x_BTD: Array, inputs: LayerInputs, is_local: Array, cache: dict[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array] | None]:
        """The new residual stream, and the cache as `Attention` leaves it."""
        config = self.config

        def norm(name: str) -> RMSNorm:
            return RMSNorm(config, self.dtype, name=name)

        attention = Attention(config, self.lora, self.dtype, self.implementation, name="attn")
        update_BTD, cache = attention(norm("attn_norm")(x_BTD), inputs, is_local, cache)
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
