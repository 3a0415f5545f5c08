"""Reads a model from a GGUF file: the configuration from its metadata, the weights tensor by tensor.

Known architectures: llama (Llama 2/3, SmolLM2), qwen2, qwen3, gemma2, gemma3. What llama.cpp's converter does to
the weights is undone here: it permutes the rows of llama's q and k (its RoPE pairs neighbors, Hugging Face's
pairs halves), and stores Gemma's norms as 1 + w.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.config import ModelConfig, RopeConfig, check_sizes
from posttrain_jax.models.io.gguf_file import GgufFile
from posttrain_jax.models.io.layout import Leaf, build, leaves

ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
_MODEL_TYPES = {"gemma3": "gemma3_text"}
_LLAMA3_SCALINGS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
"""(factor, low, high, original length) of the published llama3 RoPE scalings: Llama 3.1, and 3.2."""

_READ = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
)
_READ_BY = {
    "gemma2": ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": (
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "final_logit_softcapping",
        "rope.freq_base_swa",
    ),
}
"""The keys below the architecture's name that are read here, in every architecture and in some."""

_HARMLESS = (
    "pooling_type",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
)
"""Keys that do not change the logits: embeddings are not pooled here, and a vocabulary is as long as its table."""

_NEUTRAL = {
    "attention.causal": True,
    "attention.scale": 0.0,
    "logit_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
}
"""Keys that may hold the value that is used here anyway."""


def load_gguf(
    path: str | pathlib.Path, shardings: PyTree | None = None, *, dtype: Any = jnp.float32
) -> tuple[ModelConfig, PyTree]:
    """Configuration and parameters of a GGUF file, dequantized.

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


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """The architecture in a file's metadata; each value is checked as it is read."""

    path: pathlib.Path
    arch: str
    values: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"{self.arch}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number; 0 may be given as a default, for "none"."""
        value = self._there(key, default)
        if isinstance(value, list):
            raise InputError(
                f"{self.path}: {self.arch}.{key} differs between layers, which is not supported."
            )
        if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != default):
            raise InputError(
                f"{self.path}: {self.arch}.{key} is {shown(value)}, but must be a positive whole number."
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number; 0 may be given as a default, for "none"."""
        value = self._there(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
            raise InputError(
                f"{self.path}: {self.arch}.{key} is {shown(value)}, but must be a positive number."
            )
        if value == 0 and value != default:
            raise InputError(f"{self.path}: {self.arch}.{key} is 0, but must be a positive number.")
        return float(value)

    def _there(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise InputError(f"{self.path}: the metadata lacks {self.arch}.{key}; convert the model again.")
        return value

    def refuse_unknown(self) -> None:
        """Refuses by name what may change the computation and is not read here."""
        read = (*_READ, *_READ_BY.get(self.arch, ()), *_HARMLESS)
        for name, value in self.values.items():
            key = name.removeprefix(f"{self.arch}.")
            neutral = value == _NEUTRAL[key] if key in _NEUTRAL else not value
            if key == name or key in read or neutral:
                continue
            if key.startswith("expert"):
                raise InputError(f"{self.path}: {self.arch} with mixture-of-experts layers is not supported.")
            if key == "attention.sliding_window":
                raise InputError(
                    f"{self.path}: {self.arch} with a sliding window of {shown(value)} is not supported from GGUF."
                )
            raise InputError(
                f"{self.path}: {name} is {shown(value)}, which is not supported from GGUF; use the model's Hugging "
                "Face folder instead."
            )


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The model's configuration, from a GGUF file's metadata.

    Raises:
      InputError: an unknown architecture, or a feature that the transformer lacks, by name.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {shown(arch)} is not supported; known: {', '.join(ARCHITECTURES)}."
        )
    meta = _Metadata(file.path, arch, file.metadata)
    meta.refuse_unknown()
    d_model, n_layers = meta.integer("embedding_length"), meta.integer("block_count")
    if n_layers > len(file.tensors):
        raise InputError(
            f"{file.path}: {arch}.block_count is {n_layers}, but the file has {len(file.tensors)} tensors."
        )
    n_heads = meta.integer("attention.head_count")
    n_kv_heads = meta.integer("attention.head_count_kv", n_heads)
    head_dim = meta.integer("attention.key_length", meta.get("rope.dimension_count", d_model // n_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(key, head_dim) != head_dim:
            raise InputError(
                f"{file.path}: {arch}.{key} is {meta.get(key)} but the head width is {head_dim}; not supported."
            )
    gemma = arch in ("gemma2", "gemma3")
    window, local = _windows(meta, n_layers)
    rope = _rope(file, meta, head_dim)
    rope_local = RopeConfig(theta=meta.real("rope.freq_base_swa", 10_000.0)) if arch == "gemma3" else rope
    query_width: float = head_dim
    if (arch, n_layers) in (("gemma2", 46), ("gemma3", 62)):  # the 27B models divide by D / H instead
        query_width = d_model / n_heads
    config = ModelConfig(
        model_type=_MODEL_TYPES.get(arch, arch),
        vocab_size=_vocab_size(file),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=meta.integer("feed_forward_length"),
        max_length=meta.integer("context_length"),
        norm_eps=_shortest(meta.real("attention.layer_norm_rms_epsilon")),
        norm_plus_one=gemma,
        sandwich_norms=gemma,
        qk_norm=arch in ("qwen3", "gemma3"),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        activation="gelu_tanh" if gemma else "silu",
        embed_scale=float(d_model) ** 0.5 if gemma else 1.0,
        query_scale=query_width**-0.5,
        attn_softcap=meta.real("attn_logit_softcapping", 50.0) if arch == "gemma2" else 0.0,
        logits_softcap=meta.real("final_logit_softcapping", 30.0 if arch == "gemma2" else 0.0)
        if gemma
        else 0.0,
        tied_embeddings="output.weight" not in file.tensors,
        rope=rope,
        rope_local=rope_local,
        sliding_window=window,
        local_layers=local,
        bos_token_id=_token_id(file, "bos"),
        eos_token_ids=tuple(
            dict.fromkeys(i for i in (_token_id(file, "eos"), _token_id(file, "eot")) if i is not None)
        ),
        pad_token_id=_token_id(file, "padding"),
    )
    check_sizes(config, str(file.path))
    return config


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(
            f"{file.path}: the file lacks tensors, token_embd.weight first of all; not a language model."
        )
    return embedding.shape[0] if embedding.shape else 0


def _token_id(file: GgufFile, name: str) -> int | None:
    """A special token's id; one beyond the vocabulary stands for none."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = file.metadata.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InputError(f"{file.path}: {key} is {shown(value)}, but must be a whole number.")
    return value if value is not None and 0 <= value < _vocab_size(file) else None


def _windows(meta: _Metadata, n_layers: int) -> tuple[int, tuple[bool, ...]]:
    """(sliding window, which layers are local), with llama.cpp's defaults."""
    if meta.arch not in ("gemma2", "gemma3"):
        return 0, ()
    window = meta.integer("attention.sliding_window", 4096 if meta.arch == "gemma2" else 0)
    pattern = meta.get("attention.sliding_window_pattern") if meta.arch == "gemma3" else None
    if isinstance(pattern, list):
        if len(pattern) != n_layers:
            raise InputError(
                f"{meta.path}: {meta.arch}.attention.sliding_window_pattern names {len(pattern)} layers but the "
                f"model has {n_layers}."
            )
        local = tuple(bool(layer) for layer in pattern)
    else:
        every = meta.integer("attention.sliding_window_pattern", 6) if meta.arch == "gemma3" else 2
        local = tuple((layer + 1) % every != 0 for layer in range(n_layers))
    return (window, local) if window and any(local) else (0, ())


def _shortest(value: float) -> float:
    """The shortest decimal that a float32 stands for: 9.99999974e-06 was meant as 1e-05."""
    return float(str(np.float32(value)))


def _rope(file: GgufFile, meta: _Metadata, head_dim: int) -> RopeConfig:
    """As llama.cpp reads it: a factor without a type is linear, and `rope.scale_linear` is the factor's old name."""
    theta = meta.real("rope.freq_base", 1_000_000.0 if meta.arch == "gemma3" else 10_000.0)
    kind = meta.get("rope.scaling.type", "linear")
    if kind not in ("linear", "none"):
        raise InputError(
            f"{file.path}: RoPE scaling {shown(kind)} is not supported; known: linear, llama3, none."
        )
    factor = meta.real("rope.scaling.factor", 0.0) or meta.real("rope.scale_linear", 0.0)
    scaled = kind == "linear" and factor not in (0.0, 1.0)
    if "rope_freqs.weight" in file.tensors:
        if scaled:
            raise InputError(f"{file.path}: both rope_freqs.weight and a linear RoPE scaling; not supported.")
        return _llama3_rope(file, theta, head_dim)
    return RopeConfig(theta, "linear", factor) if scaled else RopeConfig(theta)


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
