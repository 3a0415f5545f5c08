"""`ModelConfig` from a Hugging Face `config.json`, and back.

Files written by transformers 4 (`rope_theta`, `rope_scaling`, `rope_local_base_freq`) and 5 (`rope_parameters`) are
both read, through transformers' own config classes, so that its defaults are ours. Written is the form of 4, which
both read. Whatever the transformer here would compute differently is refused by name.

A `...ForSequenceClassification` with one label is a reward model. It has no vocabulary projection, so its config is
read as `tied_embeddings`, whatever the file says: its parameters have no `head`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from posttrain_jax.errors import InputError
from posttrain_jax.models.config import ModelConfig, RopeConfig

FAMILIES = ("gemma2", "gemma3", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""The `model_type`s that are known; "gemma3" (with images) is read as its text model."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

_ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REWARD_ARCHITECTURES = {
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}
_REWARD_FIELDS = ("num_labels", "id2label", "label2id", "score_bias")
"""What the config.json of a reward model says more; `score_bias` is ours, for transformers' head has no bias."""

_NOT_KEPT = (
    "quantization_config",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "rope_parameters",
    *_REWARD_FIELDS,
)
"""Fields of an original config.json that an export drops: no longer true, or (`rope_parameters`) silently ignored by
transformers 4, which would then use its default RoPE."""

_ALWAYS_OURS = (
    "architectures",
    "model_type",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    *_REWARD_FIELDS,
)
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


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
    return any(name.endswith("ForSequenceClassification") for name in fields.get("architectures") or ())


def text_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the text model (all of it, except for multimodal Gemma 3)."""
    if fields.get("model_type") != "gemma3":
        return fields
    text = dict(fields.get("text_config") or {})
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"):
        if fields.get(key) is not None:
            text.setdefault(key, fields[key])
    text |= {key: fields[key] for key in ("architectures", *_REWARD_FIELDS) if fields.get(key) is not None}
    return {**text, "model_type": "gemma3_text"}


def _config_from_dict(fields: dict[str, Any], where: str, generation: dict[str, Any]) -> ModelConfig:
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}."
        )
    fields = text_config(fields)
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unknown")
        raise InputError(
            f"{where}: the weights are quantised ({method}), which is not supported; use the original."
        )
    if fields.get("per_layer_config"):
        raise InputError(f"{where}: per_layer_config (layers of different shapes) is not supported.")
    try:
        hf = AutoConfig.for_model(**{k: v for k, v in fields.items() if k != "quantization_config"})
    except Exception as error:  # transformers validates with exceptions of its own
        raise InputError(f"{where}: transformers refuses it: {' '.join(str(error).split())}") from error
    config = _from_transformers(hf, where, generation)
    if not is_reward_config(fields):
        return config
    if hf.num_labels != 1:
        raise InputError(
            f"{where}: a {fields['architectures'][0]} with {hf.num_labels} labels is a classifier, which is not "
            "supported; a reward model has one (num_labels 1)."
        )
    return reward_config(config)


def _from_transformers(hf: PreTrainedConfig, where: str, generation: dict[str, Any]) -> ModelConfig:
    values = hf.to_dict()
    model_type: str = values["model_type"]
    gemma = model_type in ("gemma2", "gemma3_text")
    activation = values.get("hidden_activation") if gemma else values["hidden_act"]
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{where}: activation {activation!r} is not supported; known: {', '.join(ACTIVATIONS)}."
        )
    if values.get("use_bidirectional_attention"):
        raise InputError(f"{where}: use_bidirectional_attention is not supported; only causal models are.")
    n_layers, head_dim = values["num_hidden_layers"], _head_dim(values)
    window, local = _windows(values, where)
    rope, rope_local = _ropes(values, where)
    bias = bool(values.get("attention_bias", False))
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
        norm_eps=values["rms_norm_eps"],
        norm_plus_one=gemma,
        sandwich_norms=gemma,
        qk_norm=model_type in ("qwen3", "gemma3_text"),
        qkv_bias=model_type == "qwen2" or bias,
        o_bias=bias and model_type != "qwen2",
        mlp_bias=model_type == "llama" and bool(values.get("mlp_bias", False)),
        activation=ACTIVATIONS[activation],
        embed_scale=float(values["hidden_size"]) ** 0.5 if gemma else 1.0,
        query_scale=(values["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        attn_softcap=float(values.get("attn_logit_softcapping") or 0.0) if gemma else 0.0,
        logits_softcap=float(values.get("final_logit_softcapping") or 0.0) if gemma else 0.0,
        tied_embeddings=bool(values["tie_word_embeddings"]),
        rope=rope,
        rope_local=rope_local,
        sliding_window=window,
        local_layers=local,
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=_ids(generation.get("eos_token_id", values.get("eos_token_id"))),
        pad_token_id=values.get("pad_token_id"),
    )


def _head_dim(values: dict[str, Any]) -> int:
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _windows(values: dict[str, Any], where: str) -> tuple[int, tuple[bool, ...]]:
    """(sliding window, which layers are local). Mistral slides in every layer; others say it by layer_types."""
    window, n_layers = values.get("sliding_window") or 0, values["num_hidden_layers"]
    if values["model_type"] == "mistral":
        return window, (True,) * n_layers if window else ()
    types = values.get("layer_types") or [_GLOBAL] * n_layers
    unknown = sorted(set(types) - {_LOCAL, _GLOBAL})
    if unknown:
        raise InputError(f"{where}: layer type {unknown[0]!r} is not supported; known: {_LOCAL}, {_GLOBAL}.")
    if len(types) != n_layers:
        raise InputError(f"{where}: layer_types names {len(types)} layers but the model has {n_layers}.")
    local = tuple(kind == _LOCAL for kind in types)
    if not any(local):
        return 0, ()
    if not window:
        raise InputError(f"{where}: layer_types has sliding_attention but there is no sliding_window.")
    return window, local


def _ropes(values: dict[str, Any], where: str) -> tuple[RopeConfig, RopeConfig]:
    """(global layers' RoPE, local layers' RoPE)."""
    fields = values["rope_parameters"]
    if _GLOBAL in fields or _LOCAL in fields:
        if _GLOBAL not in fields or _LOCAL not in fields:
            raise InputError(f"{where}: rope_parameters must give both {_GLOBAL} and {_LOCAL}.")
        return _rope(fields[_GLOBAL], where), _rope(fields[_LOCAL], where)
    rope = _rope(fields, where)
    return rope, rope


def _rope(fields: dict[str, Any], where: str) -> RopeConfig:
    kind = fields.get("rope_type", "default")
    if (fields.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor is not supported; RoPE turns whole heads here.")
    theta = float(fields["rope_theta"])
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", float(fields["factor"]))
    if kind == "llama3":
        low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
        return RopeConfig(
            theta, "llama3", float(fields["factor"]), low, high, fields["original_max_position_embeddings"]
        )
    raise InputError(f"{where}: RoPE scaling {kind!r} is not supported; known: default, linear, llama3.")


def reward_config(config: ModelConfig) -> ModelConfig:
    """The config of a reward model made of the model of `config`: the same without a vocabulary projection."""
    return dataclasses.replace(config, tied_embeddings=True)


def config_to_hf(
    config: ModelConfig,
    original: dict[str, Any] | None = None,
    *,
    reward: bool = False,
    score_bias: float = 0.0,
) -> dict[str, Any]:
    """The contents of a config.json that transformers 4 and 5 load as the same model.

    Args:
      original: the config.json that the model came with; its other fields are kept.
      reward: a reward model, `...ForSequenceClassification` with one label.
      score_bias: of a reward model: what its scores are above those that transformers computes.
    """
    config = reward_config(config) if reward else config
    written = _fields(config)
    if reward:
        written["architectures"] = [_REWARD_ARCHITECTURES[config.model_type]]
        written |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        written |= {"score_bias": score_bias} if score_bias else {}
    if original is None:
        return written
    kept = {key: value for key, value in text_config(original).items() if key not in _NOT_KEPT}
    merged = {**kept, **{key: written[key] for key in _ALWAYS_OURS if key in written}}
    return merged if config_from_hf(merged) == config else written


def _fields(config: ModelConfig) -> dict[str, Any]:
    gemma = config.model_type in ("gemma2", "gemma3_text")
    eos: int | list[int] | None = list(config.eos_token_ids) or None
    if len(config.eos_token_ids) == 1:
        eos = config.eos_token_ids[0]
    activation = "silu" if config.activation == "silu" else "gelu_pytorch_tanh"
    fields: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
        "attention_dropout": 0.0,
        "hidden_activation" if gemma else "hidden_act": activation,
    }
    layer_types = [_LOCAL if local else _GLOBAL for local in config.local_layers] or [
        _GLOBAL
    ] * config.n_layers
    match config.model_type:
        case "llama":
            fields |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
        case "mistral":
            fields |= {"sliding_window": config.sliding_window or None}
        case "qwen2" | "qwen3":
            fields |= {"use_sliding_window": config.any_local, "layer_types": layer_types}
            fields |= {"sliding_window": config.sliding_window if config.any_local else None}
            if config.model_type == "qwen3":
                fields |= {"attention_bias": config.qkv_bias}
        case "gemma2" | "gemma3_text":
            scalar = config.query_scale**-2
            fields |= {
                "attention_bias": config.qkv_bias,
                "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
                "sliding_window": config.sliding_window or None,
                "layer_types": layer_types,
                "attn_logit_softcapping": config.attn_softcap or None,
                "final_logit_softcapping": config.logits_softcap or None,
            }
            if config.model_type == "gemma3_text":
                fields |= {"rope_local_base_freq": config.rope_local.theta}
    return fields


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    if rope.scaling == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
