"""The one decoder-only transformer: every family in `hf_config.FAMILIES` is this definition with other numbers.

Layers are scanned (one compiled body, parameters stacked on a leading L axis). Flax Linen stays inside this
folder; the rest of the code sees `Model.apply(params, tokens_BT, ...) -> ModelOutput`, a pure function.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import constrain_activations
from posttrain_jax.core.types import Array, ModelOutput, PyTree
from posttrain_jax.models.attention import IMPLEMENTATIONS, default_implementation
from posttrain_jax.models.attention_mask import AttentionMask, soft_cap
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.decoding import extend, prefill
from posttrain_jax.models.kernels.matmul import few_rows, few_rows_matmul
from posttrain_jax.models.layers import Block, Embedding, LayerInputs, RMSNorm

# What is saved for the backward pass, by name; it computes everything else of a layer again.
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


class Head(nn.Module):
    """Holds the untied vocabulary projection, so that `init` makes it; `head_VD` is how it is read."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.config.vocab_size, self.config.d_model)
        return self.param("kernel", nn.initializers.normal(0.02), shape, jnp.float32)


class Transformer(nn.Module):
    """Tokens to final hidden states; the vocabulary projection is not part of it (see `forward/heads.py`)."""

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
        mask = AttentionMask.packed_rows(segment_ids_BT, positions_BT, branches_BT)
        inputs = LayerInputs.of(config, mask, positions_BT)
        layers = nn.scan(
            nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=config.n_layers,
        )(config, self.lora, self.dtype, self.implementation, name="layers")
        x_BTD, _ = layers(x_BTD, inputs, jnp.asarray(config.layer_is_local))
        return RMSNorm(config, self.dtype, name="final_norm")(x_BTD)


@dataclasses.dataclass(frozen=True)
class Model:
    """The transformer as pure functions of its parameters (plain nested dicts). Made by `make_model`."""

    config: ModelConfig
    lora: LoraConfig
    dtype: str
    module: Transformer

    @property
    def _block(self) -> Block:
        module = self.module
        return Block(module.config, module.lora, module.dtype, module.implementation)

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
            cache already holds). Packed rows need them.
          branches_BT: completions that share their segment's prompt (branch 0): a token of branch b sees the prompt
            and b alone. Positions go on after the prompt in every branch. Not with a cache.
          cache: from `kv_cache.init_cache`; the real tokens are appended to each row. Segments cannot be packed in
            a cache.
          logits: also project all positions on the vocabulary, `[B, T, V]` float32. For notebooks, parity
            and decoding; train steps use `forward.heads.token_logps`, which never holds such an array.
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
            hidden_BTD, cache = extend(self._block, params, tokens_BT, positions_BT, segment_ids_BT, cache)
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
        return prefill(self._block, params, tokens_BT, start, cache)

    def logits(self, params: PyTree, hidden_BTD: Array) -> Array:
        """Float32 logits `[..., V]` of hidden states `[..., D]`, soft-capped where the family does."""
        head = head_VD(params).astype(hidden_BTD.dtype)
        if few_rows(hidden_BTD):
            logits = few_rows_matmul(hidden_BTD, head, jnp.float32)
        else:
            logits = jnp.einsum("...d,vd->...v", hidden_BTD, head, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.logits_softcap)


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
      attention: "xla", "blocks" (CPU), "cudnn" (GPU), "splash" (TPU), or "auto": what suits the platform and the model.
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
