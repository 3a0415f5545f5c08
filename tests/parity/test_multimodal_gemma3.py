"""The text model inside a multimodal Gemma 3 folder: found, equal on text, exported as a text model."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")

from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from parity.torch_families import make_config, randomize
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import load_model


def test_multimodal_gemma3(tmp_path: pathlib.Path) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=make_config("gemma3"), vision_config=vision, mm_tokens_per_image=4, image_token_index=95
    )
    reference = Gemma3ForConditionalGeneration(config).eval()
    reference.set_attn_implementation("eager")
    randomize(reference, 3)
    reference.save_pretrained(tmp_path / "both")
    tokens_BT = np.random.default_rng(4).integers(3, 90, (2, 12)).astype(np.int32)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens_BT)).logits.numpy()
    loaded = load_model(str(tmp_path / "both"))
    logits = np.asarray(jax.jit(loaded.model.apply)(loaded.params, tokens_BT).logits_BTV)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()

    export_hf(
        tmp_path / "text",
        config=loaded.config,
        params=loaded.params,
        tokenizer=None,
        original=loaded.original,
    )
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    assert text.config.model_type == "gemma3_text"
    with torch.no_grad():
        again = text(torch.tensor(tokens_BT)).logits.numpy()
    assert np.abs(again - expected).max() <= 1e-5 * np.abs(expected).max()
