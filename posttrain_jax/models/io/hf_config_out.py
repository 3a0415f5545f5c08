"""A `ModelConfig` as a Hugging Face `config.json`.

It is written in the form of transformers 4, which 5 reads too. Every config is read back before it is returned, and
must describe the same model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.models.config import ModelConfig, RopeConfig
from posttrain_jax.models.io.hf_config import (
    GLOBAL,
    LOCAL,
    REWARD_FIELDS,
    config_from_hf,
    reward_config,
    text_config,
)

_ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REWARD_ARCHITECTURES = {
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "ministral": "MinistralForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}

_NOT_KEPT = (
    "quantization_config",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "rope_parameters",
    *REWARD_FIELDS,
)
"""Fields of an original config.json that an export drops: no longer true, or (`rope_parameters`) silently ignored by
transformers 4, which would then use its default RoPE."""

_ALWAYS_OURS = (
    "architectures",
    "model_type",
    "head_dim",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "rope_parameters",
    *REWARD_FIELDS,
)


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
      score_bias: of a reward model: its scores minus those that transformers computes.
    """
    config = reward_config(config) if reward else config
    written = _fields(config)
    if reward:
        written["architectures"] = [_REWARD_ARCHITECTURES[config.model_type]]
        written |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        written |= {"score_bias": score_bias} if score_bias else {}
    if original is None:
        return _read_back(written, config)
    kept = {key: value for key, value in text_config(original).items() if key not in _NOT_KEPT}
    merged = {**kept, **{key: written[key] for key in _ALWAYS_OURS if key in written}}
    return merged if not _changed(merged, config) else _read_back(written, config)


def _read_back(written: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json after reading it as transformers would and checking that it describes the same model.

    Raises:
      InputError: a config.json of this family cannot describe the model.
    """
    changed = _changed(written, config)
    if changed:
        raise InputError(
            f"The model cannot be exported as {config.model_type}, for a config.json of that family cannot say its "
            f"{changed}."
        )
    return written


def _changed(fields: dict[str, Any], config: ModelConfig) -> str:
    """The first thing that would be read differently from a config.json, with its value; "" where there is none."""
    ours, theirs = (dataclasses.asdict(_what_counts(each)) for each in (config, config_from_hf(fields)))
    return next((f"{name} ({shown(ours[name])})" for name in ours if ours[name] != theirs[name]), "")


def _what_counts(config: ModelConfig) -> ModelConfig:
    """The config without the numbers of layers that it does not have."""
    if not config.any_local:
        return dataclasses.replace(config, sliding_window=0, local_layers=(), rope_local=config.rope)
    return config if config.any_global else dataclasses.replace(config, rope=config.rope_local)


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
    layer_types = [LOCAL if local else GLOBAL for local in config.local_layers] or [GLOBAL] * config.n_layers
    match config.model_type:
        case "llama":
            fields |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
        case "mistral":
            fields |= {"sliding_window": config.sliding_window or None}
        case "ministral":
            fields |= {"sliding_window": config.sliding_window or None, "layer_types": layer_types}
        case "qwen2" | "qwen3":
            fields |= {"use_sliding_window": config.any_local, "layer_types": layer_types}
            fields |= {"sliding_window": config.sliding_window if config.any_local else None}
            if config.model_type == "qwen3":
                fields |= {"attention_bias": config.qkv_bias}
        case "gemma2" | "gemma3_text":
            scalar = config.query_scale**-2
            fields |= {
                "attention_bias": config.qkv_bias,
                "query_pre_attn_scalar": round(scalar)
                if abs(scalar - round(scalar)) < 1e-6 * scalar
                else scalar,
                "sliding_window": config.sliding_window
                or config.max_length,  # transformers wants one in any case
                "layer_types": layer_types,
                "attn_logit_softcapping": config.attn_softcap or None,
                "final_logit_softcapping": config.logits_softcap or None,
            }
            if config.model_type == "gemma3_text":
                fields |= {"rope_local_base_freq": config.rope_local.theta}
            if config.rope_local.scaling != "none" and config.model_type == "gemma3_text":
                # Transformers 4 has no scaling of local layers, and no key for it.
                ropes = {GLOBAL: _rope_5(config.rope), LOCAL: _rope_5(config.rope_local)}
                fields |= {"rope_parameters": ropes}
    return fields


def _rope_5(rope: RopeConfig) -> dict[str, Any]:
    """RoPE in the form of transformers 5."""
    return {"rope_theta": rope.theta, **(_rope_scaling(rope) or {"rope_type": "default"})}


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
