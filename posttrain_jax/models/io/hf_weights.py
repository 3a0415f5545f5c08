"""Safetensors in and out: each parameter goes straight to the devices that hold it, tensor by tensor."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.trees import leaf_paths
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.hf_config import read_json
from posttrain_jax.models.io.layout import Leaf, build, get_path, leaves

_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")
"""What comes before `embed_tokens`, `layers` and `norm`: causal LMs, bare models, multimodal Gemma 3 (4.x, 5.x)."""

_IGNORED = ("rotary_emb.inv_freq", "vision_tower.", "multi_modal_projector.", "lm_head.weight")
"""Parts of names that may be left over: buffers, image towers, a head that is tied (and checked to be equal)."""

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def load_safetensors(
    folder: str | pathlib.Path,
    config: ModelConfig,
    shardings: PyTree | None = None,
    dtype: Any = jnp.float32,
    *,
    reward: bool = False,
) -> PyTree:
    """The parameters of a Hugging Face folder (model.safetensors, or shards with their index).

    Only the slices that this host's devices need are read, one parameter after the other: the host never holds a
    second copy of the model.

    Args:
      shardings: a tree of shardings like the parameters, or None for the default device.
      dtype: what the parameters are stored as; a score head is float32.
      reward: the folder holds a `...ForSequenceClassification` with one label: its score head is read too, with gain
        1 and the bias that config.json notes (`score_bias`, which is ours; 0 without it).

    Raises:
      InputError: no safetensors, damaged files, or missing, unexpected or wrongly shaped tensors.
    """
    folder = pathlib.Path(folder)
    handles = _open(folder)
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in handles), "model.")
    head = next((n for n in handles if n.endswith("lm_head.weight")), "lm_head.weight")

    def name_of(leaf: Leaf, layer: int) -> str:
        if leaf.path[0] == "score_head":
            return leaf.hf
        return head if leaf.path[0] == "head" else prefix + leaf.hf.format(layer)

    expected = {name_of(leaf, n): leaf for leaf in leaves(config, reward=reward) for n in _layers(leaf)}
    _check(folder, handles, config, expected)
    if config.tied_embeddings and not reward and head in handles:
        _check_tied(folder, handles[head], handles[prefix + "embed_tokens.weight"], head, prefix)

    def read(leaf: Leaf, layer: int, index: tuple[slice, ...]) -> np.ndarray:
        name = name_of(leaf, layer)
        return handles[name].get_slice(name)[index]

    params = build(config, read, shardings, dtype, reward=reward)
    if reward:
        bias = _score_bias(folder / "config.json")
        for name, value in (("gain", 1.0), ("bias", bias)):
            sharding = None if shardings is None else shardings["score_head"][name]
            params["score_head"][name] = _scalar(value, sharding)
    return params


def _score_bias(path: pathlib.Path) -> float:
    bias = read_json(path).get("score_bias", 0.0)
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -1e38 < bias < 1e38:
        raise InputError(f"{path}: score_bias is {shown(bias)}, but must be a number.")
    return float(bias)


def _scalar(value: float, sharding: jax.sharding.Sharding | None) -> Array:
    if sharding is None:
        return jnp.asarray(value, jnp.float32)
    return jax.make_array_from_callback((), sharding, lambda _: np.float32(value), jnp.float32)


def _layers(leaf: Leaf) -> range:
    return range(leaf.shape[0] if leaf.stacked else 1)


def _open(folder: pathlib.Path) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        files = _files_of(index)
    else:
        files = []
    if not files:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        if pickles:
            raise InputError(
                f"{folder}: only {pickles[0]} was found, a pickle, which can run code when it is loaded, so it is "
                "refused; convert it where you trust it: transformers' from_pretrained(...) then save_pretrained(...) "
                "writes safetensors."
            )
        raise InputError(
            f"{folder}: there is no model.safetensors (or model.safetensors.index.json) in this folder."
        )
    handles: dict[str, Any] = {}
    for file in files:
        path = folder / file
        if pathlib.PurePath(file).name != file or not os.path.isfile(path):  # False for names that cannot be
            raise InputError(
                f"{folder}: the index names this file but it is not there: {shown(file)}; download the model again."
            )
        try:
            handle = safe_open(str(path), framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: not a readable safetensors file ({error}); download it again."
            ) from error
        handles.update(dict.fromkeys(handle.keys(), handle))
    return handles


def _files_of(index: pathlib.Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map does not name a file for each tensor; download it again.")
    return sorted(set(weight_map.values()))


def _check(
    folder: pathlib.Path, handles: dict[str, Any], config: ModelConfig, expected: dict[str, Leaf]
) -> None:
    missing = sorted(set(expected) - set(handles))
    unexpected = sorted(n for n in set(handles) - set(expected) if not any(part in n for part in _IGNORED))
    wrong = []
    for name in sorted(set(expected) & set(handles)):
        tensor = handles[name].get_slice(name)
        shape, want = tuple(tensor.get_shape()), expected[name].file_shape
        if shape != want:
            wrong.append(f"{name} {shape} instead of {want}")
        elif tensor.get_dtype() not in _DTYPES:
            wrong.append(f"{name} of type {tensor.get_dtype()} instead of {', '.join(_DTYPES)}")
    for what, names in (
        ("lacks tensors", missing),
        ("has unknown tensors", unexpected),
        ("has wrong tensors", wrong),
    ):
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise InputError(f"{folder}: the model {what} for its {config.model_type} config.json: {shown}.")


def _check_tied(folder: pathlib.Path, head_file: Any, embed_file: Any, head: str, prefix: str) -> None:
    """A tied model may carry its head, but then it must be the embedding."""
    ours, theirs = embed_file.get_slice(prefix + "embed_tokens.weight"), head_file.get_slice(head)
    rows = ours.get_shape()[0]
    same = ours.get_shape() == theirs.get_shape()
    for start in range(0, rows if same else 0, 8192):
        block = slice(start, min(start + 8192, rows))
        same = same and np.array_equal(ours[block], theirs[block])
    if not same:
        raise InputError(
            f"{folder}: config.json says tie_word_embeddings but {head} differs from the embedding; "
            "set tie_word_embeddings to false in config.json."
        )


def save_safetensors(
    params: PyTree,
    config: ModelConfig,
    folder: str | pathlib.Path,
    max_shard_bytes: float = 5e9,
    dtype: Any = None,
) -> None:
    """Writes the parameters as Hugging Face safetensors: one file, or shards with an index.

    A tied head is not written. The host holds at most one shard beside the parameters.

    Args:
      params: without adapter leaves (see `peft.merge_lora`); of a reward model with `score_head/kernel` and without
        a vocabulary projection (see `reward_head.fold_gain`).
      dtype: stored as this; None keeps each parameter's own.

    Raises:
      InputError: the parameters are not those of `config`.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = leaves(config, reward="score_head" in params)
    odd = sorted(set(leaf_paths(params)) ^ {"/".join(leaf.path) for leaf in stored})
    if odd:
        raise InputError(
            f"{folder}: the parameters to export do not fit the model: {odd[0]} (merge adapters first)."
        )
    shards = list(_plan(params, config, max_shard_bytes, dtype))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {hf: _tensor(params, leaf, layer, dtype) for hf, leaf, layer in shard}
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors makes it readable by its owner alone
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _plan(
    params: PyTree, config: ModelConfig, max_shard_bytes: float, dtype: Any
) -> Iterator[list[tuple[str, Leaf, int]]]:
    """Which tensors go into which file, in the order of the forward pass of each layer's parts."""
    shard: list[tuple[str, Leaf, int]] = []
    size = 0
    for leaf in leaves(config, reward="score_head" in params):
        name = leaf.hf if leaf.path[0] in ("head", "score_head") else "model." + leaf.hf
        stored = jnp.dtype(dtype or get_path(params, leaf.path).dtype)
        for layer in _layers(leaf):
            n_bytes = int(np.prod(leaf.file_shape)) * stored.itemsize
            if shard and size + n_bytes > max_shard_bytes:
                yield shard
                shard, size = [], 0
            shard.append((name.format(layer), leaf, layer))
            size += n_bytes
    yield shard


def _tensor(params: PyTree, leaf: Leaf, layer: int, dtype: Any) -> np.ndarray:
    array = get_path(params, leaf.path)
    value = np.asarray(array[layer] if leaf.stacked else array)
    if dtype is not None:
        value = value.astype(jnp.dtype(dtype))
    return np.ascontiguousarray(value.T if leaf.transposed else value)
