"""The sizes and options of a decoder: `ModelConfig`, built from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.schema import setting


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and how its frequencies are stretched.

    Attributes:
      theta: the base of the geometric series of frequencies.
      scaling: "none", "linear" (positions divided by `factor`) or "llama3" (low frequencies divided by
        `factor`, high ones kept, a smooth ramp between; Llama 3.1, arXiv:2407.21783).
      factor, low_freq_factor, high_freq_factor, original_max_position: the scaling's parameters.
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Families differ in these fields only; there is one definition.

    Attributes:
      model_type: Hugging Face's name of the family ("llama", "qwen3", "gemma3_text" ...).
      vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff: sizes V, D, L, H, G, K, F.
      max_length: longest position the model was made for (tokens).
      norm_eps: epsilon of every RMSNorm.
      norm_plus_one: the norm multiplies by 1 + w instead of w (Gemma).
      sandwich_norms: norms after attention and after the MLP too, before the residual add (Gemma 2, 3).
      qk_norm: RMSNorm over each query's and key's head width before RoPE (Qwen3, Gemma 3).
      qkv_bias, o_bias, mlp_bias: linear layers with a bias.
      activation: "silu" or "gelu_tanh", the gate of the gated MLP.
      embed_scale: the embedding's output is multiplied by this (Gemma: sqrt(D)); 1 = off.
      query_scale: attention scores are multiplied by this (usually K ** -0.5).
      attn_softcap, logits_softcap: c * tanh(x / c) on scores / logits; 0 = off.
      tied_embeddings: the vocabulary projection is the embedding, transposed.
      rope: RoPE of the global layers; rope_local: RoPE of the sliding-window layers.
      sliding_window: a local layer's query sees this many latest tokens, itself included; 0 = no local layers.
      local_layers: per layer, whether it is a sliding-window layer.
      bos_token_id, eos_token_ids, pad_token_id: None / () where the model names none.
    """

    model_type: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_length: int = 2048
    norm_eps: float = 1e-5
    norm_plus_one: bool = False
    sandwich_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    query_scale: float = 0.125
    attn_softcap: float = 0.0
    logits_softcap: float = 0.0
    tied_embeddings: bool = True
    rope: RopeConfig = RopeConfig()
    rope_local: RopeConfig = RopeConfig()
    sliding_window: int = 0
    local_layers: tuple[bool, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def any_local(self) -> bool:
        return self.sliding_window > 0 and any(self.local_layers)

    @property
    def layer_is_local(self) -> tuple[bool, ...]:
        """For every layer, whether it is a sliding-window layer."""
        return self.local_layers or (False,) * self.n_layers

    @property
    def any_global(self) -> bool:
        return not (self.sliding_window > 0 and all(self.local_layers) and self.local_layers)


MOST_LAYERS = 10_000
"""More layers than any model has, so that a damaged file does not ask for a billion."""


def check_sizes(config: ModelConfig, where: str) -> None:
    """Refuses sizes of which no transformer can be made.

    Raises:
      InputError: one that is not positive or too large, heads that cannot be shared, an odd head width.
    """
    sizes = {
        "vocabulary": config.vocab_size,
        "width": config.d_model,
        "number of layers": config.n_layers,
        "number of attention heads": config.n_heads,
        "number of key-value heads": config.n_kv_heads,
        "head width": config.head_dim,
        "feed-forward width": config.d_ff,
        "longest position": config.max_length,
    }
    for name, size in sizes.items():
        if not 0 < size < 2**31:
            raise InputError(f"{where}: the {name} is {size}, of which no model can be made.")
    if config.n_layers > MOST_LAYERS:
        raise InputError(
            f"{where}: the model has {config.n_layers} layers; at most {MOST_LAYERS} are supported."
        )
    if config.n_heads % config.n_kv_heads:
        raise InputError(
            f"{where}: {config.n_heads} attention heads cannot share {config.n_kv_heads} key-value heads evenly."
        )
    if config.head_dim % 2:
        raise InputError(
            f"{where}: the head width is {config.head_dim}, but RoPE turns pairs, so it must be even."
        )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685): W x + scale * B (A x), A and B trained, W frozen.

    The scale is alpha / R, or alpha / sqrt(R) with `rslora` (arXiv:2312.03732).
    """

    rank: int = setting(0, "R; 0 = every parameter is trained, no adapter", maximum=65_536)
    alpha: float = setting(16.0, "the adapter's output times alpha / R", above=0)
    targets: tuple[str, ...] = setting(
        ("q", "k", "v", "o", "gate", "up", "down"), "which linear layers: any of q k v o gate up down"
    )
    rslora: bool = setting(False, "alpha / sqrt(R) instead")

    def of_layer(self, name: str) -> LoraConfig | None:
        """The adapter of a linear layer, by our name of it; None where it has none."""
        return self if self.rank and name in self.targets else None

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
