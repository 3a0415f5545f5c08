"""Keys of config.json that another family reads, or newer versions write: `transformers`' logits all the same.

The folder is loaded as its user would, by AutoModel: a key that transformers ignores must change nothing here.
"""

from __future__ import annotations

import json
import logging
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")

from transformers import AutoConfig, AutoModelForCausalLM

from parity.torch_families import randomize
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import load_model

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 16)).astype(np.int32)
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
CASES = {
    "mistral_layer_types": {"model_type": "mistral", "sliding_window": 4, "layer_types": TYPES},
    "mistral_all_full": {"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"] * 3},
    "mistral_types_null": {"model_type": "mistral", "sliding_window": 4, "layer_types": None},
    "mistral_biases": {
        "model_type": "mistral",
        "sliding_window": None,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama_windows": {
        "model_type": "llama",
        "sliding_window": 4,
        "layer_types": TYPES,
        "use_sliding_window": True,
        "attn_logit_softcapping": 0.5,
        "query_pre_attn_scalar": 3,
    },
    "qwen2_bias": {"model_type": "qwen2", "attention_bias": True},
    "gemma3_cap": {
        "model_type": "gemma3_text",
        "sliding_window": 4,
        "layer_types": TYPES,
        "attn_logit_softcapping": 0.1,
        "final_logit_softcapping": 0.5,
        "hidden_act": "silu",
    },
    "gemma3_local_scaling": {
        "model_type": "gemma3_text",
        "sliding_window": 6,
        "layer_types": TYPES,
        "rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 1e6}, "sliding_attention": LINEAR},
    },
}
SAID = {
    "mistral_biases": "mistral model: attention_bias = True, mlp_bias = True",
    "llama_windows": "llama model: attn_logit_softcapping = 0.5, layer_types = ",
    "qwen2_bias": "qwen2 model: attention_bias = True",
    "gemma3_cap": "gemma3_text model: attn_logit_softcapping = 0.1",
}
"""What is ignored is said."""


def their_logits(folder: pathlib.Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS), use_cache=False).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_export(case: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, **CASES[case]}))
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomize(made, seed=0)
    made.save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(folder / "model.safetensors")
    expected = their_logits(folder)
    with caplog.at_level(logging.WARNING):
        ours = load_model(str(folder))
    assert SAID.get(case, "") in caplog.text
    logits = np.asarray(ours.apply(ours.params, TOKENS).logits_BTV)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    for original in (ours.original, None):
        out = tmp_path / ("fresh" if original is None else "kept")
        export_hf(out, config=ours.config, params=ours.params, tokenizer=None, original=original)
        np.testing.assert_array_equal(their_logits(out), expected)
