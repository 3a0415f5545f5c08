"""Where every parameter lives: its path in our tree, its name in Hugging Face and GGUF files, its shape.

One table serves import, export, adapters and tests, so that they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.config import ModelConfig

PROJECTIONS = {
    "q": ("attn", "self_attn.q_proj", "attn_q"),
    "k": ("attn", "self_attn.k_proj", "attn_k"),
    "v": ("attn", "self_attn.v_proj", "attn_v"),
    "o": ("attn", "self_attn.o_proj", "attn_output"),
    "gate": ("mlp", "mlp.gate_proj", "ffn_gate"),
    "up": ("mlp", "mlp.up_proj", "ffn_up"),
    "down": ("mlp", "mlp.down_proj", "ffn_down"),
}
"""Our name of a linear layer -> (our block, Hugging Face's module, GGUF's stem)."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter leaf.

    Attributes:
      path: keys into the parameter tree.
      hf: tensor name in Hugging Face files; `{}` stands for the layer of a stacked leaf.
      gguf: tensor name in GGUF files, likewise.
      shape: our global shape; a stacked leaf starts with L.
      stacked: one tensor per layer in the file.
      transposed: the file stores (out, in), we store (in, out).
      norm: the scale of an RMSNorm.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]
    stacked: bool = True
    transposed: bool = False
    norm: bool = False

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the file."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def projection_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer, by our names."""
    d, f = config.d_model, config.d_ff
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "q": (d, queries),
        "k": (d, keys),
        "v": (d, keys),
        "o": (queries, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }


def _has_bias(config: ModelConfig, name: str) -> bool:
    if name in ("q", "k", "v"):
        return config.qkv_bias
    return config.o_bias if name == "o" else config.mlp_bias


def leaves(config: ModelConfig, *, reward: bool = False) -> list[Leaf]:
    """Every parameter that a file holds, without adapters, in the order of the forward pass.

    Args:
      reward: of a reward model: a score head's kernel in place of the vocabulary projection.
    """
    n_layers, d = config.n_layers, config.d_model

    def norm(name: str, hf: str, gguf: str, width: int = d, block: tuple[str, ...] = ()) -> Leaf:
        path = ("layers", *block, name, "scale")
        return Leaf(path, f"layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight", (n_layers, width), norm=True)

    out = [
        Leaf(
            ("embed", "embedding"), "embed_tokens.weight", "token_embd.weight", (config.vocab_size, d), False
        )
    ]
    out.append(norm("attn_norm", "input_layernorm", "attn_norm"))
    sizes = projection_sizes(config)
    for name, (block, hf, gguf) in PROJECTIONS.items():
        if name == "gate":
            if config.sandwich_norms:
                out.append(norm("post_attn_norm", "post_attention_layernorm", "post_attention_norm"))
                out.append(norm("mlp_norm", "pre_feedforward_layernorm", "ffn_norm"))
            else:
                out.append(norm("mlp_norm", "post_attention_layernorm", "ffn_norm"))
        path, kernel = ("layers", block, name), (n_layers, *sizes[name])
        names = f"layers.{{}}.{hf}", f"blk.{{}}.{gguf}"
        out.append(
            Leaf((*path, "kernel"), names[0] + ".weight", names[1] + ".weight", kernel, transposed=True)
        )
        if _has_bias(config, name):
            out.append(
                Leaf((*path, "bias"), names[0] + ".bias", names[1] + ".bias", (n_layers, sizes[name][1]))
            )
    if config.qk_norm:
        out.append(norm("q_norm", "self_attn.q_norm", "attn_q_norm", config.head_dim, ("attn",)))
        out.append(norm("k_norm", "self_attn.k_norm", "attn_k_norm", config.head_dim, ("attn",)))
    if config.sandwich_norms:
        out.append(norm("post_mlp_norm", "post_feedforward_layernorm", "post_ffw_norm"))
    out.append(Leaf(("final_norm", "scale"), "norm.weight", "output_norm.weight", (d,), False, norm=True))
    if reward:
        out.append(Leaf(("score_head", "kernel"), "score.weight", "", (d, 1), False, transposed=True))
    elif not config.tied_embeddings:
        out.append(Leaf(("head", "kernel"), "lm_head.weight", "output.weight", (config.vocab_size, d), False))
    return out


def get_path(tree: PyTree, path: tuple[str, ...]) -> Any:
    """The subtree at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def set_path(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Puts `value` at `path`, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


Read = Callable[[Leaf, int, tuple[slice, ...]], np.ndarray]
"""(leaf, layer, slices in the file's axes) -> that part of the layer's tensor, in the file's axes."""


def build(
    config: ModelConfig, read: Read, shardings: PyTree | None, dtype: Any, *, reward: bool = False
) -> PyTree:
    """The parameter tree, each leaf read straight onto its devices.

    Holds on the host, besides the result, what its devices need of one leaf.

    Args:
      read: reads one layer's tensor, or a part of it.
      shardings: a tree of `jax.sharding.Sharding` like the parameters, or None: the default device, uncommitted.
      dtype: what the leaves are stored as; a score head's kernel always as float32.
      reward: see `leaves`.
    """
    params: dict[str, Any] = {}
    for leaf in leaves(config, reward=reward):
        sharding = None if shardings is None else get_path(shardings, leaf.path)
        stored = jnp.dtype(jnp.float32 if leaf.path[0] == "score_head" else dtype)
        set_path(params, leaf.path, _build_leaf(leaf, read, sharding, stored))
    return params


def _build_leaf(leaf: Leaf, read: Read, sharding: jax.sharding.Sharding | None, dtype: np.dtype) -> Array:
    made: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices that hold the same part share it

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(leaf.shape)
        bounds = tuple(i.indices(n)[:2] for i, n in zip(index, leaf.shape, strict=True))
        if bounds not in made:
            made[bounds] = read_part(tuple(slice(*pair) for pair in bounds))
        return made[bounds]

    def read_part(index: tuple[slice, ...]) -> np.ndarray:
        out = _staging([i.stop - i.start for i in index], dtype)
        if not leaf.stacked:
            piece = read(leaf, 0, index[::-1] if leaf.transposed else index)
            out[:] = piece.T if leaf.transposed else piece
            return out
        rest = index[1:][::-1] if leaf.transposed else index[1:]
        for row, layer in enumerate(range(index[0].start, index[0].stop)):
            piece = read(leaf, layer, rest)
            out[row] = piece.T if leaf.transposed else piece
        return out

    if sharding is None:
        value = jax.device_put(part(None))
    else:
        value = jax.make_array_from_callback(leaf.shape, sharding, part, dtype)
    value.block_until_ready()
    buffers = [weakref.ref(buffer) for buffer in made.values()]
    made.clear()
    _wait_until_freed(buffers)
    return value


def _staging(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty host buffer that jax copies from.

    A buffer on a 64-byte boundary would be used in place on the CPU, and such an array cannot be donated to a step.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + 16
    return memory[start : start + size].view(dtype).reshape(shape)


def _wait_until_freed(buffers: list[weakref.ref[np.ndarray]]) -> None:
    """Waits (at most 10 s) until jaxlib has let go of host buffers that it has copied.

    It does so a little after the copy, when Python collects garbage; without the wait, a fast disk gets ahead of it
    and the host holds several parameters at once.
    """
    end = time.monotonic() + 10
    while time.monotonic() < end:
        gc.collect(0)
        if all(buffer() is None for buffer in buffers):
            return
        time.sleep(0.001)
