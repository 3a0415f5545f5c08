"""LoRA adapters in PEFT's format (adapter_config.json and adapter_model.safetensors), in and out; and merging."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.hf_config import read_json
from posttrain_jax.models.io.layout import PROJECTIONS, get_path, projection_sizes, set_path

_PREFIX = "base_model.model.model."
_MODULES = {hf: name for name, (_, hf, _) in PROJECTIONS.items()}
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.|language_model\.)*"
    r"layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.lora_([AB])\.weight"
)
"""A text model's tensor, in PEFT's names; `language_model` is the text model of a multimodal Gemma 3."""

_PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
"""PEFT settings that change what an adapter computes, and the only value of each that is supported."""

_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", "base_model_name_or_path")
_HARMLESS = (
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
"""PEFT settings of how an adapter was initialized or trained, not of what it computes: the tensors in the file tell
which
modules have one, and the others are about settings that are refused."""


def load_adapter(folder: str | pathlib.Path, config: ModelConfig) -> tuple[LoraConfig, PyTree]:
    """An adapter in PEFT's format: its config, and its leaves `lora_a`, `lora_b` as a tree like the parameters.

    `trees.combine(params, leaves)` puts them into the model; `merge_lora` adds them to the kernels.

    Raises:
      InputError: not plain LoRA, a pickle, or tensors that do not fit the model.
    """
    folder = pathlib.Path(folder)
    where = folder / "adapter_config.json"
    fields = read_json(where)
    if fields.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type {fields.get('peft_type')!r} is not supported; only LORA is.")
    _check_settings(fields, where)
    grouped = _grouped(folder)
    targets = tuple(name for name in PROJECTIONS if (name, "A") in grouped or (name, "B") in grouped)
    if not targets:
        raise InputError(f"{folder}: the adapter has no tensors; give a complete PEFT adapter folder.")
    rank = int(fields["r"])
    lora = LoraConfig(rank, float(fields["lora_alpha"]), targets, bool(fields.get("use_rslora", False)))
    leaves: dict[str, Any] = {}
    for name in targets:
        width_in, width_out = projection_sizes(config)[name]
        for side, shape in (("A", (rank, width_in)), ("B", (width_out, rank))):
            layers = grouped.get((name, side), {})
            _check_layers(folder, f"{PROJECTIONS[name][1]}.lora_{side}", layers, config.n_layers, shape)
            stacked = np.stack([layers[n].T.astype(np.float32) for n in range(config.n_layers)])
            set_path(
                leaves, ("layers", PROJECTIONS[name][0], name, f"lora_{side.lower()}"), jnp.asarray(stacked)
            )
    return lora, leaves


def _check_settings(fields: dict[str, Any], where: pathlib.Path) -> None:
    """Refuses every setting that changes what an adapter computes, or whose effect is unknown."""
    for key, value in fields.items():
        if key in _READ or key in _HARMLESS:
            continue
        if (value or None) != (_PLAIN.get(key) or None):
            known = "only plain LoRA is" if key in _PLAIN else "its effect is not known here"
            raise InputError(
                f"{where}: {key} = {shown(value)} is not supported ({known}); where PEFT can merge such an "
                "adapter into its base model, do that and give the merged model."
            )
    if fields.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise InputError(
            f"{where}: init_lora_weights = {shown(fields['init_lora_weights'])} changes the base model, which is not "
            "supported; convert the adapter to plain LoRA with PEFT first."
        )
    for key, kind in (("r", int), ("lora_alpha", int | float)):
        value = fields.get(key)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**31:
            raise InputError(
                f"{where}: {key} is {shown(fields.get(key, 'absent'))}, but must be a positive number; without it "
                "nothing says how strong the adapter is."
            )
    if fields.get("use_rslora") not in (None, True, False):
        raise InputError(f"{where}: use_rslora is {shown(fields['use_rslora'])}, but must be true or false.")


def _grouped(folder: pathlib.Path) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """(our name of a module, "A" or "B") -> layer -> tensor; a tensor that is not a text layer's is refused."""
    grouped: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for key, value in _read_tensors(folder).items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in _MODULES:
            raise InputError(
                f"{folder}: the adapter has tensor {shown(key)}, which no layer of the text model takes; train "
                f"adapters of {', '.join(_MODULES)} of the text model alone."
            )
        layers = grouped.setdefault((_MODULES[match[2]], match[3]), {})
        if int(match[1]) in layers:
            raise InputError(
                f"{folder}: the adapter has two tensors for one module, {shown(key)} is the second."
            )
        layers[int(match[1])] = value
    return grouped


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"{folder / 'adapter_model.bin'}: a pickle can run code when it is loaded, so it is refused; load it "
                "with PEFT where you trust it and save_pretrained(...) it as safetensors."
            )
        raise InputError(f"{path}: there is no such file; give a complete PEFT adapter folder.")
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); download it again.") from error


def _check_layers(
    folder: pathlib.Path, what: str, layers: dict[int, np.ndarray], n_layers: int, shape: tuple[int, int]
) -> None:
    if sorted(layers) != list(range(n_layers)):
        raise InputError(
            f"{folder}: {what} is there for layers {sorted(layers)}, but the model has 0..{n_layers - 1}."
        )
    for layer, value in layers.items():
        if value.shape != shape:
            raise InputError(
                f"{folder}: {what} of layer {layer} has shape {value.shape}, but the model needs {shape}."
            )


def save_adapter(
    params: PyTree, lora: LoraConfig, config: ModelConfig, folder: str | pathlib.Path, *, base_model: str = ""
) -> None:
    """Writes the adapter leaves of `params` in PEFT's format.

    Args:
      params: a tree that has `lora_a` and `lora_b` in the targets of `lora`; other leaves are ignored.
      base_model: what PEFT loads the adapter onto, a folder or a name; "" = none is named.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in lora.targets:
        block, hf, _ = PROJECTIONS[name]
        for side in ("A", "B"):
            stacked = np.asarray(
                get_path(params, ("layers", block, name, f"lora_{side.lower()}")), np.float32
            )
            for layer in range(config.n_layers):
                key = f"{_PREFIX}layers.{layer}.{hf}.lora_{side}.weight"
                tensors[key] = np.ascontiguousarray(stacked[layer].T)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    fields = {
        **_PLAIN,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "target_modules": [PROJECTIONS[name][1].rsplit(".", 1)[1] for name in lora.targets],
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", "utf-8")


def merge_lora(params: PyTree, lora: LoraConfig) -> PyTree:
    """`params` with every adapter added to its kernel, W + scale * A B in float32, and without adapter leaves."""
    if "lora_a" in params:
        rest = {key: value for key, value in params.items() if key not in ("lora_a", "lora_b")}
        return {**rest, "kernel": _merged(params["kernel"], params["lora_a"], params["lora_b"], lora.scale)}
    return {
        key: merge_lora(value, lora) if isinstance(value, dict) else value for key, value in params.items()
    }


def merge_error(params: PyTree, lora: LoraConfig, dtype: str) -> float:
    """The share of the adapters that is lost when they are merged into kernels that are stored as `dtype`.

    |stored(W + D) - stored(W) - D| / |D| with D = scale * A B, Frobenius norms over all kernels with an adapter: 0 is
    exact, 1 as much error as there is change. A D far below the rounding of W (of bfloat16 2^-9 of a weight) is lost.
    """

    def sums(tree: PyTree) -> np.ndarray:
        if "lora_a" in tree:
            return np.asarray(
                _lost(tree["kernel"], tree["lora_a"], tree["lora_b"], lora.scale, dtype), np.float64
            )
        parts = [sums(value) for value in tree.values() if isinstance(value, dict)]
        return np.sum([np.zeros(2), *parts], axis=0)

    lost, change = sums(params)
    return float(np.sqrt(lost / change)) if change else 0.0


@functools.partial(jax.jit, static_argnames="dtype")
def _lost(kernel: Array, lora_a: Array, lora_b: Array, scale: float, dtype: str) -> Array:
    """(sum of squares of what is lost, of the change), layer by layer: in float32 they hold one layer's."""

    def layer(parts: tuple[Array, Array, Array]) -> Array:
        base, a, b = (part.astype(jnp.float32) for part in parts)
        change = scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        stored = [value.astype(dtype).astype(jnp.float32) for value in (base + change, base)]
        return jnp.stack([jnp.sum(jnp.square(stored[0] - stored[1] - change)), jnp.sum(jnp.square(change))])

    return jnp.sum(jax.lax.map(layer, (kernel, lora_a, lora_b)), axis=0)


@jax.jit
def _merged(kernel: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    update = jnp.einsum(
        "lir,lro->lio",
        lora_a,
        lora_b,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)
