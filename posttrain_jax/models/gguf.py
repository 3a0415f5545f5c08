"""Reads a model from a GGUF file: the configuration from its metadata, the weights tensor by tensor.

Known architectures: llama (Llama 2/3, SmolLM2), qwen2, qwen3, gemma2, gemma3. What llama.cpp's converter does to
the weights is undone here: it permutes the rows of llama's q and k (its RoPE pairs neighbours, Hugging Face's
pairs halves), and stores Gemma's norms as 1 + w.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.errors import InputError
from posttrain_jax.models.config import ModelConfig, RopeConfig
from posttrain_jax.models.gguf_file import GgufFile
from posttrain_jax.models.layout import Leaf, build, leaves
from posttrain_jax.types import PyTree

ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
_MODEL_TYPES = {"gemma3": "gemma3_text"}
_LLAMA3_SCALINGS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
"""(factor, low, high, original length) of the published llama3 RoPE scalings: Llama 3.1, and 3.2."""


def load_gguf(
    path: str | pathlib.Path, shardings: PyTree | None = None, *, dtype: Any = jnp.float32
) -> tuple[ModelConfig, PyTree]:
    """Configuration and parameters of a GGUF file, dequantised.

    Args:
      shardings: a tree of shardings like the parameters, or None for the default device.
      dtype: what the parameters are stored as.

    Raises:
      InputError: an unknown architecture, a feature that the transformer lacks, missing or unknown tensors.
    """
    file = GgufFile(path)
    config = config_from_gguf(file)
    _check_tensors(file, config)
    heads = {"q": config.n_heads, "k": config.n_kv_heads} if config.model_type == "llama" else {}

    def read(leaf: Leaf, layer: int, index: tuple[slice, ...]) -> np.ndarray:
        tensor = file.read(leaf.gguf.format(layer))
        if len(leaf.path) > 2 and leaf.path[2] in heads:
            tensor = _unpermute(tensor, heads[leaf.path[2]])
        return tensor[index] - 1.0 if leaf.norm and config.norm_plus_one else tensor[index]

    return config, build(config, read, shardings, dtype)


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (pair, half) order back to (half, pair)."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _check_tensors(file: GgufFile, config: ModelConfig) -> None:
    expected = {}
    for leaf in leaves(config):
        for layer in range(config.n_layers if leaf.stacked else 1):
            expected[leaf.gguf.format(layer)] = leaf.file_shape
    missing = sorted(set(expected) - set(file.tensors))
    unexpected = sorted(set(file.tensors) - set(expected) - {"rope_freqs.weight"})
    wrong = [
        f"{n} {file.tensors[n].shape}"
        for n in expected
        if n in file.tensors and file.tensors[n].shape != expected[n]
    ]
    for what, names in (("lacks", missing), ("has unknown", unexpected), ("has, in a wrong shape,", wrong)):
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise InputError(
                f"{file.path}: the file {what} tensors for a {config.model_type} model: {shown}."
            )


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The model's configuration, from a GGUF file's metadata.

    Raises:
      InputError: an unknown architecture, or a feature that the transformer lacks, by name.
    """
    meta = file.metadata
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {arch!r} is not supported; known: {', '.join(ARCHITECTURES)}."
        )

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"{arch}.{key}", default)
        if value is None:
            raise InputError(f"{file.path}: the metadata lacks {arch}.{key}; convert the model again.")
        return value

    if get("expert_count", 0):
        raise InputError(f"{file.path}: {arch} with mixture-of-experts layers is not supported.")
    d_model, n_layers, n_heads = get("embedding_length"), get("block_count"), get("attention.head_count")
    n_kv_heads = get("attention.head_count_kv", n_heads)
    for key, value in (("attention.head_count", n_heads), ("attention.head_count_kv", n_kv_heads)):
        if not isinstance(value, int):
            raise InputError(f"{file.path}: {arch}.{key} differs between layers, which is not supported.")
    head_dim = get("attention.key_length", get("rope.dimension_count", d_model // n_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise InputError(
                f"{file.path}: {arch}.{key} is {get(key)} but the head width is {head_dim}; not supported."
            )

    gemma = arch in ("gemma2", "gemma3")
    window = get("attention.sliding_window", 0)
    local: tuple[bool, ...] = ()
    if gemma and window:
        every = 2 if arch == "gemma2" else 6
        local = tuple((layer + 1) % every != 0 for layer in range(n_layers))
    elif window:
        raise InputError(f"{file.path}: {arch} with a sliding window of {window} is not supported from GGUF.")
    rope = _rope(file, arch, head_dim)
    rope_local = rope
    if arch == "gemma3":
        rope_local = RopeConfig(theta=get("rope.freq_base_swa", 10_000.0))
    query_width: float = head_dim
    if (arch, n_layers) in (("gemma2", 46), ("gemma3", 62)):  # the 27B models divide by D / H instead
        query_width = d_model / n_heads
    bias = "blk.0.attn_q.bias" in file.tensors
    eos = tuple(
        meta[f"tokenizer.ggml.{k}"] for k in ("eos_token_id", "eot_token_id") if f"tokenizer.ggml.{k}" in meta
    )
    return ModelConfig(
        model_type=_MODEL_TYPES.get(arch, arch),
        vocab_size=file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=get("feed_forward_length"),
        max_length=get("context_length"),
        norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        norm_plus_one=gemma,
        sandwich_norms=gemma,
        qk_norm=arch in ("qwen3", "gemma3"),
        qkv_bias=bias,
        activation="gelu_tanh" if gemma else "silu",
        embed_scale=float(d_model) ** 0.5 if gemma else 1.0,
        query_scale=query_width**-0.5,
        attn_softcap=get("attn_logit_softcapping", 50.0) if arch == "gemma2" else 0.0,
        logits_softcap=get("final_logit_softcapping", 30.0) if arch == "gemma2" else 0.0,
        tied_embeddings="output.weight" not in file.tensors,
        rope=rope,
        rope_local=rope_local,
        sliding_window=window,
        local_layers=local,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
    )


def _shortest(value: float) -> float:
    """The shortest decimal that a float32 stands for: 9.99999974e-06 was meant as 1e-05."""
    return float(str(np.float32(value)))


def _rope(file: GgufFile, arch: str, head_dim: int) -> RopeConfig:
    meta = file.metadata
    default = 1_000_000.0 if arch == "gemma3" else 10_000.0
    theta = float(meta.get(f"{arch}.rope.freq_base", default))
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, theta, head_dim)
    if kind == "none":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=float(meta[f"{arch}.rope.scaling.factor"]))
    raise InputError(f"{file.path}: RoPE scaling {kind!r} is not supported; known: linear, llama3, none.")


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> RopeConfig:
    """The llama3 scaling whose divisors are the file's `rope_freqs` (the metadata does not name it)."""
    divisors = file.read("rope_freqs.weight")
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for factor, low, high, original in _LLAMA3_SCALINGS:
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        if np.allclose(divisors, 1.0 / ((1.0 - smooth) / factor + smooth), rtol=1e-4):
            return RopeConfig(theta, "llama3", factor, low, high, original)
    raise InputError(
        f"{file.path}: the tensor rope_freqs.weight is not a known llama3 RoPE scaling; not supported."
    )
