"""`ModelConfig` from a Hugging Face `config.json`; `hf_config_out.py` is the way back.

Files written by transformers 4 (`rope_theta`, `rope_scaling`, `rope_local_base_freq`) and 5 (`rope_parameters`) are
both read, through transformers' own config classes, so that its defaults are ours. The
reference is what transformers computes from a file: a key that changes it is honored or refused by name (`hf_keys.py`),
and so is a value that no model can have.

A `...ForSequenceClassification` with one label is a reward model. It has no vocabulary projection, so its config is
read as `tied_embeddings`, whatever the file holds: its parameters have no `head`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from typing import Any

from transformers import AutoConfig

from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.models.config import ModelConfig, RopeConfig, check_sizes
from posttrain_jax.models.io.hf_keys import check_keys, check_values, log_once

FAMILIES = ("gemma2", "gemma3", "gemma3_text", "llama", "ministral", "mistral", "qwen2", "qwen3")
"""The `model_type`s that are known; "gemma3" (with images) is read as its text model."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

REWARD_FIELDS = ("num_labels", "id2label", "label2id", "score_bias")
"""Keys of config.json that only reward models have; `score_bias` is ours, for transformers' head has no bias."""

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""What a file calls its layers with and without a sliding window."""

_WITH_ATTENTION_BIAS = ("gemma2", "gemma3_text", "llama", "qwen3")
"""Families whose linear layers in the attention, all four, have a bias if attention_bias is true."""

_NOT_OURS = ("auto_map", "dtype", "quantization_config", "torch_dtype")
"""Fields that do not describe the computation, and that transformers may trip over."""

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""RoPE type -> the keys that it has of its own."""

_ROPE_ALWAYS = (
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: no such file, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: there is no such file; give a complete Hugging Face model folder."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be read; download the file again.") from error
    except ValueError as error:  # JSON, UTF-8, or an integer of more digits than Python reads
        reason = str(error).split(";", 1)[0]
        raise InputError(f"{path}: not valid JSON ({reason}); download the file again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object was expected; download the file again.")
    return value


def config_from_hf(source: str | pathlib.Path | dict[str, Any]) -> ModelConfig:
    """The configuration of a Hugging Face model.

    Args:
      source: the model's folder (its generation_config.json gives the ids that end a generation, where it has one),
        or the contents of its config.json.

    Raises:
      InputError: an unknown model type, or a feature that the transformer lacks, by name.
    """
    if isinstance(source, dict):
        return _config_from_dict(source, "config.json", {})
    folder = pathlib.Path(source)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return _config_from_dict(read_json(folder / "config.json"), str(folder / "config.json"), generation)


def is_reward_config(fields: dict[str, Any]) -> bool:
    """Whether a config.json is that of a reward model (`architectures` ends with ForSequenceClassification)."""
    return any(name.endswith("ForSequenceClassification") for name in _architectures(fields))


def _architectures(fields: dict[str, Any]) -> list[str]:
    names = fields.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"config.json: architectures is {shown(names)}, but must be a list of names.")
    return names


def text_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the text model (all of it, except for multimodal Gemma 3).

    A mistral whose layers differ is a ministral, as for transformers.
    """
    if fields.get("model_type") == "mistral" and "layer_types" in fields:
        return {**fields, "model_type": "ministral"}
    if fields.get("model_type") != "gemma3":
        return fields
    text = fields.get("text_config") or {}
    if not isinstance(text, dict):
        raise InputError(f"config.json: text_config is {shown(text)}, but must be an object.")
    text = dict(text)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"):
        if fields.get(key) is not None:
            text.setdefault(key, fields[key])
    outer = ("architectures", "tie_word_embeddings", *REWARD_FIELDS)
    text |= {key: fields[key] for key in outer if fields.get(key) is not None}
    return {**text, "model_type": "gemma3_text"}


def _config_from_dict(fields: dict[str, Any], where: str, generation: dict[str, Any]) -> ModelConfig:
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}."
        )
    if model_type == "gemma3":
        check_keys(fields, "gemma3", where)
    fields = text_config(fields)
    quantized = fields.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise InputError(
            f"{where}: the weights are quantized ({shown(method)[:40]}), which is not supported; use the original."
        )
    if fields.get("per_layer_config"):
        raise InputError(f"{where}: per_layer_config (layers of different shapes) is not supported.")
    if fields.get("is_causal", True) is not True:
        raise InputError(
            f"{where}: is_causal is {shown(fields['is_causal'])}; only causal models are supported (true)."
        )
    check_keys(fields, fields["model_type"], where)
    check_values(fields, where)
    _check_rope_form(fields, where)
    try:
        # A copy, for transformers writes into the dicts that it is given.
        theirs = copy.deepcopy({key: value for key, value in fields.items() if key not in _NOT_OURS})
        hf = AutoConfig.for_model(**theirs)
        values = hf.to_dict()
    except Exception as error:  # transformers validates with exceptions of its own
        raise InputError(f"{where}: transformers refuses it: {' '.join(str(error).split())[:300]}") from error
    config = _from_transformers(values, where, generation)
    check_sizes(config, where)
    if not is_reward_config(fields):
        return config
    if hf.num_labels != 1:
        raise InputError(
            f"{where}: a {_architectures(fields)[0]} with {hf.num_labels} labels is a classifier, which is not "
            "supported; a reward model has one (num_labels 1)."
        )
    return reward_config(config)


def _from_transformers(values: dict[str, Any], where: str, generation: dict[str, Any]) -> ModelConfig:
    model_type: str = values["model_type"]
    gemma = model_type in ("gemma2", "gemma3_text")
    activation = values["hidden_activation"] if gemma else values["hidden_act"]
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{where}: activation {shown(activation)} is not supported; known: {', '.join(ACTIVATIONS)}."
        )
    if values.get("use_bidirectional_attention"):
        raise InputError(f"{where}: use_bidirectional_attention is not supported; only causal models are.")
    n_layers, head_dim = values["num_hidden_layers"], _head_dim(values)
    window, local = _windows(values, where)
    if model_type == "ministral" and len(set(local)) < 2:
        model_type = "mistral"  # as all its layers are alike
    rope, rope_local = _ropes(values, where)
    bias = model_type in _WITH_ATTENTION_BIAS and bool(values["attention_bias"])
    return ModelConfig(
        model_type=model_type,
        vocab_size=values["vocab_size"],
        d_model=values["hidden_size"],
        n_layers=n_layers,
        n_heads=values["num_attention_heads"],
        n_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        head_dim=head_dim,
        d_ff=values["intermediate_size"],
        max_length=values["max_position_embeddings"],
        norm_eps=_number(values, "rms_norm_eps", where, zero=True),
        norm_plus_one=gemma,
        sandwich_norms=gemma,
        qk_norm=model_type in ("qwen3", "gemma3_text"),
        qkv_bias=model_type == "qwen2" or bias,
        o_bias=bias,
        mlp_bias=model_type == "llama" and bool(values.get("mlp_bias", False)),
        activation=ACTIVATIONS[activation],
        embed_scale=float(values["hidden_size"]) ** 0.5 if gemma else 1.0,
        query_scale=(_number(values, "query_pre_attn_scalar", where) if gemma else head_dim) ** -0.5,
        attn_softcap=_cap(values, "attn_logit_softcapping", where) if model_type == "gemma2" else 0.0,
        logits_softcap=_cap(values, "final_logit_softcapping", where) if gemma else 0.0,
        tied_embeddings=bool(values["tie_word_embeddings"]),
        rope=rope,
        rope_local=rope_local,
        sliding_window=window,
        local_layers=local,
        bos_token_id=_id(values, "bos_token_id", where),
        eos_token_ids=_ids(generation if "eos_token_id" in generation else values, "eos_token_id", where),
        pad_token_id=_id(values, "pad_token_id", where),
    )


def _head_dim(values: dict[str, Any]) -> int:
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def _number(values: dict[str, Any], key: str, where: str, *, zero: bool = False) -> float:
    """A positive number (or 0, where that makes sense)."""
    value: Any = values.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e30 or (value == 0 and not zero):
        raise InputError(f"{where}: {key} is {shown(value)}, but must be a positive number.")
    return float(value)


def _cap(values: dict[str, Any], key: str, where: str) -> float:
    """A soft cap; 0 where there is none."""
    return 0.0 if values.get(key) is None else _number(values, key, where)


def _ids(values: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    """Token ids; a negative one, as some files have it, stands for none."""
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(index, bool) or not isinstance(index, int) for index in ids):
        raise InputError(f"{where}: {key} is {shown(value)}, but must be a token id, or a list of them.")
    return tuple(index for index in ids if index >= 0)


def _id(values: dict[str, Any], key: str, where: str) -> int | None:
    index = next(iter(_ids(values, key, where)), None)
    if index is not None and index >= values["vocab_size"]:  # it would be looked up in the embedding
        log_once(f"{where}: {key} is {shown(index)}, beyond the vocabulary, and is not used.")
        return None
    return index


def _windows(values: dict[str, Any], where: str) -> tuple[int, tuple[bool, ...]]:
    """(sliding window, which layers are local). Mistral slides in every layer, llama in none; others name them in
    layer_types."""
    n_layers = values["num_hidden_layers"]
    if values["model_type"] == "llama":
        return 0, ()
    if values["model_type"] == "mistral":
        types = [LOCAL if values["sliding_window"] is not None else GLOBAL] * n_layers
    else:
        types = values["layer_types"]
    unknown = sorted(set(types) - {LOCAL, GLOBAL})
    if unknown:
        raise InputError(f"{where}: layer type {unknown[0]!r} is not supported; known: {LOCAL}, {GLOBAL}.")
    if len(types) != n_layers:
        raise InputError(f"{where}: layer_types names {len(types)} layers but the model has {n_layers}.")
    if LOCAL not in types:
        return 0, ()
    window = values["sliding_window"]
    if window is None:
        raise InputError(f"{where}: layer_types has sliding_attention but there is no sliding_window.")
    if not 0 < window < 2**31:
        raise InputError(f"{where}: sliding_window is {shown(window)}, but must be a positive whole number.")
    return window, tuple(kind == LOCAL for kind in types)


def _check_rope_form(fields: dict[str, Any], where: str) -> None:
    """Refuses rope_parameters in the form of another family, which transformers passes over or falls over."""
    if fields.get("partial_rotary_factor") not in (None, 1.0):
        raise InputError(f"{where}: partial_rotary_factor is not supported; RoPE turns whole heads here.")
    ropes = fields.get("rope_parameters")
    if not isinstance(ropes, dict) or not ropes:
        return
    if fields["model_type"] == "gemma3_text":
        other = sorted(set(ropes) - {GLOBAL, LOCAL})
        if other:
            raise InputError(
                f"{where}: rope_parameters has {shown(other[0])} beside its layer types, which transformers ignores "
                f"for gemma3; give {GLOBAL} and {LOCAL}."
            )
    elif GLOBAL in ropes or LOCAL in ropes:
        raise InputError(f"{where}: rope_parameters differ between layer types, which only gemma3 can.")


def _ropes(values: dict[str, Any], where: str) -> tuple[RopeConfig, RopeConfig]:
    """(global layers' RoPE, local layers' RoPE)."""
    fields = values["rope_parameters"]
    if values["model_type"] == "gemma3_text":
        return _rope(fields[GLOBAL], where), _rope(fields[LOCAL], where)
    rope = _rope(fields, where)
    return rope, rope


def _rope(fields: dict[str, Any], where: str) -> RopeConfig:
    kind = fields.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise InputError(
            f"{where}: RoPE scaling {shown(kind)} is not supported; known: {', '.join(_ROPE_KEYS)}."
        )
    if fields.get("partial_rotary_factor") not in (None, 1.0):
        raise InputError(f"{where}: partial_rotary_factor is not supported; RoPE turns whole heads here.")
    for key, value in fields.items():
        if key not in (*_ROPE_KEYS[kind], *_ROPE_ALWAYS) and value is not None:
            raise InputError(
                f"{where}: RoPE of type {kind} has {shown(key)} = {shown(value)}, which transformers ignores; name "
                "the type that it belongs to (rope_type), or remove it."
            )
    theta = _number(fields, "rope_theta", where)
    if kind == "default":
        return RopeConfig(theta)
    factor = _number(fields, "factor", where)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    low, high = _number(fields, "low_freq_factor", where), _number(fields, "high_freq_factor", where)
    if high <= low:
        raise InputError(
            f"{where}: RoPE's high_freq_factor ({high:g}) must be above low_freq_factor ({low:g})."
        )
    original = _number(fields, "original_max_position_embeddings", where)
    if original != int(original):
        raise InputError(f"{where}: original_max_position_embeddings is {original}, but must be whole.")
    return RopeConfig(theta, "llama3", factor, low, high, int(original))


def reward_config(config: ModelConfig) -> ModelConfig:
    """The config of a reward model made of the model of `config`: the same without a vocabulary projection."""
    return dataclasses.replace(config, tied_embeddings=True)
