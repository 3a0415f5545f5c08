"""`ModelConfig` from config.json files as they lie on the Hub (transformers 4 and 5), and back."""

from __future__ import annotations

import json
import pathlib

import pytest
from transformers import AutoConfig

from posttrain_jax.errors import InputError
from posttrain_jax.models.config import RopeConfig
from posttrain_jax.models.hf_config import config_from_hf, config_to_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 8, "sliding_window": 4}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3_ROPE = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({}, RopeConfig(1e4)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, LLAMA3_ROPE),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, LLAMA3_ROPE),
        ({"rope_theta": 1e5, "rope_scaling": None}, RopeConfig(1e5)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeConfig(1e4, "linear", 4.0)),
        ({"rope_parameters": {**LINEAR, "rope_theta": 2e4}}, RopeConfig(2e4, "linear", 2.0)),
    ],
)
def test_rope_in_files_of_transformers_4_and_5(fields: dict, rope: RopeConfig) -> None:
    config = config_from_hf({**LLAMA, **fields})
    assert config.rope == rope
    assert config.rope_local == rope


def test_gemma3_rope_and_layers_in_files_of_transformers_4_and_5() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = config_from_hf({**GEMMA3, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling})
    ropes = {
        "full_attention": {**scaling, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    new = config_from_hf({**GEMMA3, "rope_parameters": ropes})
    assert old == new
    assert (old.rope, old.rope_local) == (RopeConfig(1e6, "linear", 8.0), RopeConfig(1e4))
    assert old.local_layers == (True,) * 5 + (False, True)  # every sixth layer is global
    assert config_from_hf({**GEMMA3, "sliding_window_pattern": 2}).local_layers == (True, False) * 3 + (True,)


def test_multimodal_gemma3_is_read_as_its_text_model() -> None:
    text = {key: value for key, value in GEMMA3.items() if key != "model_type"}
    config = config_from_hf({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})
    assert config.model_type == "gemma3_text"
    assert (config.d_model, config.eos_token_ids) == (16, (1, 106))
    assert config_from_hf(config_to_hf(config)) == config


def test_sliding_windows() -> None:
    """Mistral: all layers; Qwen2: from max_window_layers on, if use_sliding_window; else none."""
    mistral = {**LLAMA, "model_type": "mistral"}
    assert config_from_hf({**mistral, "sliding_window": 8}).local_layers == (True, True)
    assert not config_from_hf({**mistral, "sliding_window": None}).any_local
    on = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert config_from_hf({**QWEN2, **on}).local_layers == (False, True)
    assert config_from_hf({**QWEN2, **on}).sliding_window == 8
    assert not config_from_hf({**QWEN2, "sliding_window": 8}).any_local
    types = ["sliding_attention", "full_attention"]
    assert config_from_hf({**QWEN2, **on, "layer_types": types}).local_layers == (True, False)


def test_biases_heads_and_ids() -> None:
    assert config_from_hf(QWEN2).qkv_bias
    assert not config_from_hf(QWEN2).o_bias
    biased = config_from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    assert config_from_hf(LLAMA).head_dim == 4
    assert config_from_hf({**LLAMA, "head_dim": 8}).query_scale == 8**-0.5
    assert config_from_hf({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}).n_kv_heads == 4
    assert config_from_hf({**LLAMA, "eos_token_id": [2, 5]}).eos_token_ids == (2, 5)
    assert config_from_hf({**LLAMA, "eos_token_id": None}).eos_token_ids == ()


def test_generation_config_says_what_ends_a_generation(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert config_from_hf(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert config_from_hf(tmp_path).eos_token_ids == (2, 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {**LLAMA, "model_type": "gpt_neox"},
            "'gpt_neox' is not supported; known: gemma2, gemma3, gemma3_text, llama",
        ),
        ({"vocab_size": 3}, "model_type None"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**LLAMA, "hidden_act": "relu"}, "activation 'relu'"),
        ({**GEMMA3, "hidden_activation": "gelu"}, "activation 'gelu'"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({**GEMMA3, "layer_types": ["full_attention"] * 6 + ["chunked_attention"]}, "chunked_attention"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({**LLAMA, "vocab_size": "many"}, "vocab_size"),
        ({**LLAMA, "hidden_size": 18}, "multiple"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_hf(fields)


def test_damaged_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        config_from_hf(tmp_path)


def test_export_keeps_the_other_fields_and_drops_what_no_longer_holds() -> None:
    original = {
        **LLAMA,
        "initializer_range": 0.01,
        "auto_map": {"AutoModel": "x.Y"},
        "torch_dtype": "bfloat16",
    }
    written = config_to_hf(config_from_hf(original), original)
    assert written["initializer_range"] == 0.01
    assert "auto_map" not in written
    assert "torch_dtype" not in written
    assert written["architectures"] == ["LlamaForCausalLM"]
    # transformers 4 ignores rope_parameters without a word, so RoPE is written in its form
    new_form = {**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    written = config_to_hf(config_from_hf(new_form), new_form)
    assert "rope_parameters" not in written
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, LLAMA3)
    unlike = config_to_hf(
        config_from_hf({**LLAMA, "rope_theta": 9e4}), original
    )  # does not fit: written anew
    assert config_from_hf(unlike).rope.theta == 9e4


def test_written_configs_mean_the_same_to_transformers() -> None:
    for fields in (LLAMA, QWEN2, GEMMA3, {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3}):
        first = AutoConfig.for_model(**fields)
        again = AutoConfig.for_model(**config_to_hf(config_from_hf(fields)))
        for key in fields.keys() | {"rope_parameters", "layer_types", "tie_word_embeddings", "head_dim"}:
            if key in first.to_dict() and key != "head_dim":
                assert again.to_dict()[key] == first.to_dict()[key], key
