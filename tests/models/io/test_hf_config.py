"""`ModelConfig` from config.json files as they lie on the Hub (transformers 4 and 5), and back."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest
from transformers import AutoConfig

from posttrain_jax.core.errors import InputError
from posttrain_jax.models.config import ModelConfig, RopeConfig
from posttrain_jax.models.io import hf_keys
from posttrain_jax.models.io.hf_config import config_from_hf
from posttrain_jax.models.io.hf_config_out import config_to_hf

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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**LLAMA, "rope_interleaved": True}, "'rope_interleaved' is True. transformers reads no such key"),
        ({**LLAMA, "embedding_multiplier": 12.0}, "'embedding_multiplier' is 12.0"),
        ({**LLAMA, "use_qk_norm": True}, "'use_qk_norm' is True"),
        ({**LLAMA, "is_causal": False}, "is_causal is False"),
        ({"model_type": "gemma3", "text_config": GEMMA3, "attn_scale": 2.0}, "'attn_scale' is 2.0"),
        ({"model_type": "gemma3", "text_config": [GEMMA3]}, "text_config is .*must be an object"),
        ({**GEMMA3, "rope_parameters": {**LINEAR, "rope_theta": 1e4}}, "'factor' beside its layer types"),
        ({**QWEN2, "rope_parameters": {"full_attention": {}}}, "rope_parameters differ between layer types"),
        ({**LLAMA, "rope_scaling": {"factor": 8.0}}, "RoPE of type default has 'factor' = 8.0"),
        ({**LLAMA, "rope_scaling": {**LINEAR, "beta_fast": 1}}, "RoPE of type linear has 'beta_fast' = 1"),
        ({**LLAMA, "rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be above low_freq_factor"),
        ({**LLAMA, "num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({**LLAMA, "head_dim": 3}, "head width is 3"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({**GEMMA3, "final_logit_softcapping": 0.0}, "final_logit_softcapping is 0"),
        ({**LLAMA, "architectures": "LlamaForCausalLM"}, "architectures is 'Llama.*must be a list"),
        ({**LLAMA, "quantization_config": "gptq"}, "gptq"),
    ],
)
def test_keys_and_values_of_no_sense_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_hf(fields)


HUB = {
    "smollm2": {
        **LLAMA,
        "attention_bias": False,
        "is_llama_config": True,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "use_cache": True,
    },
    "vicuna": {
        **LLAMA,
        "max_sequence_length": 2048,
        "_name_or_path": "vicuna",
        "temperature": 0.9,
        "do_sample": True,
    },
    "qwen2.5": {**QWEN2, "max_window_layers": 28, "use_sliding_window": False, "use_mrope": False},
    "gemma2": {
        **GEMMA3,
        "model_type": "gemma2",
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window_size": 4096,
    },
    "gemma3": {
        **GEMMA3,
        "_sliding_window_pattern": 6,
        "cache_implementation": "hybrid",
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
}
"""What real files say beside the sizes."""


@pytest.mark.parametrize("name", HUB)
def test_files_of_the_hub_are_read_without_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config_from_hf(HUB[name])
    assert not [record for record in caplog.records if record.name.startswith("posttrain_jax")]


def test_what_nobody_reads_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config_from_hf({**LLAMA, "my_note": "x" * 99, "eos_token_id": [2, -1], "pad_token_id": 32})
    assert "ignored, as transformers does for a llama model: my_note = 'xxx" in caplog.text
    assert "pad_token_id is 32, beyond the vocabulary, and is not used" in caplog.text
    assert len(caplog.text) < 800


@pytest.mark.parametrize("family", [*hf_keys._READ_BY, "gemma3"])
def test_every_key_of_transformers_is_known(family: str) -> None:
    """A key that a newer transformers adds to a family must be looked at, before it is read past."""
    read = hf_keys._GEMMA3_WITH_IMAGES if family == "gemma3" else hf_keys._READ_BY[family]
    ignored = {"attn_logit_softcapping"} if family == "gemma3_text" else {"is_encoder_decoder"}
    known = {*hf_keys._READ, *hf_keys._HARMLESS, *hf_keys._HARMLESS_BY.get(family, ()), *read, *ignored}
    assert set(AutoConfig.for_model(family).to_dict()) - known <= {"is_encoder_decoder"}


VALUES = (
    "x",
    "",
    -1,
    0,
    1,
    10**12,
    10**400,
    0.5,
    -2.5,
    float("nan"),
    float("inf"),
    True,
    None,
    [],
    [1, "a"],
    {"a": 1},
)


@pytest.mark.parametrize("family", hf_keys._READ_BY)
def test_any_value_of_any_key_is_read_or_refused_in_a_sentence(family: str) -> None:
    """And what is read can be exported, and is the same model then."""
    base = {**LLAMA, "model_type": family, "head_dim": 4}
    base |= (
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1} if family != "llama" else {}
    )
    keys = sorted({*hf_keys._READ, *hf_keys._READ_BY[family]} - {"model_type"})
    ropes = [{"rope_scaling": {**LLAMA3, key: value}} for key in LLAMA3 for value in VALUES]
    configs = [read_or_refused({**base, **change}) for change in [*one_changed(keys), *ropes]]
    read = [config for config in configs if config]
    assert len(read) > 100
    for config in read:
        assert config_from_hf(config_to_hf(config)) == config


def one_changed(keys: list[str]) -> Iterator[dict]:
    yield from ({key: value} for key in keys for value in VALUES)


def read_or_refused(fields: dict) -> ModelConfig | None:
    try:
        return config_from_hf(fields)
    except InputError as error:
        assert 20 < len(str(error)) < 500  # noqa: PT017
        return None


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
