"""Small random `transformers` models, one for each family and each feature of it that changes the numbers."""

from __future__ import annotations

import copy
import pathlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

_TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA = {**_TINY, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
_ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama2": ("llama", {**_TINY, "num_key_value_heads": 4}),
    "llama3": ("llama", {**_TINY, "rope_parameters": _LLAMA3, "head_dim": 16}),
    "llama_linear": (
        "llama",
        {**_TINY, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama_biases": ("llama", {**_TINY, "attention_bias": True, "mlp_bias": True}),
    "smollm2": (
        "llama",
        {
            **_TINY,
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "rms_norm_eps": 1e-5,
        },
    ),
    "mistral": ("mistral", {**_TINY, "sliding_window": None, "head_dim": 16}),
    "mistral_sliding": ("mistral", {**_TINY, "sliding_window": 6}),
    "qwen2": ("qwen2", {**_TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_sliding": (
        "qwen2",
        {
            **_TINY,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {**_TINY, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_biases": ("qwen3", {**_TINY, "head_dim": 16, "attention_bias": True}),
    "gemma2": (
        "gemma2",
        {**_GEMMA, "layer_types": _ALTERNATE, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 0.9},
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA,
            "layer_types": _ALTERNATE,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
"""Name -> (model_type, the other fields of its config)."""


def make_config(name: str) -> PretrainedConfig:
    """The config of a family in `FAMILIES`."""
    model_type, fields = FAMILIES[name]
    return AutoConfig.for_model(model_type, **copy.deepcopy(fields))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Larger weights, and norms and biases away from their trivial values, so that a mistake in any shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.12 * noise)
    model.tie_weights()


def make_model(config: PretrainedConfig, folder: pathlib.Path, seed: int = 0) -> torch.nn.Module:
    """A random float32 model in eval mode with eager attention (which has soft caps), saved in `folder`."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomize(model, seed)
    model.eval()
    model.save_pretrained(folder)
    return model
