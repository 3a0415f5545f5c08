"""GGUF files of random models, written with the `gguf` package as llama.cpp's converter writes them.

Two references: the torch model that the file was written from, and transformers' own reader of the file. The second
ignores RoPE scaling and soft caps in the metadata, so it is asked only where its defaults apply.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")

import gguf
from transformers import AutoConfig, AutoModelForCausalLM

from parity.torch_families import make_model
from posttrain_jax.core.errors import InputError
from posttrain_jax.models.io.gguf import load_gguf
from posttrain_jax.models.transformer import make_model as make_ours

_TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA = {**_TINY, "head_dim": 256, "hidden_size": 128, "sliding_window": 5}
_CASES: dict[str, tuple[str, dict, bool]] = {
    "llama": ("llama", {**_TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, True),
    "llama3": ("llama", {**_TINY, "head_dim": 64, "rope_parameters": _LLAMA3}, False),
    "llama_linear": (
        "llama",
        {**_TINY, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        False,
    ),
    "qwen2": ("qwen2", {**_TINY, "tie_word_embeddings": True}, True),
    "qwen3": ("qwen3", {**_TINY, "head_dim": 128}, True),
    "gemma2": ("gemma2", _GEMMA, True),
    "gemma2_caps": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 0.8, "final_logit_softcapping": 0.7},
        False,
    ),
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 6}, True),
}
"""Name -> (model_type, config, whether transformers' reader understands the whole file)."""


def write_gguf(model: torch.nn.Module, path: pathlib.Path) -> None:
    config = model.config.to_dict()
    arch = config["model_type"].removesuffix("_text")
    layers, heads, kv_heads = (
        config[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("random")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    if arch.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        value = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            rows = heads if "q_proj" in name else kv_heads
            value = (
                value.reshape(rows, 2, value.shape[0] // rows // 2, -1).swapaxes(1, 2).reshape(value.shape)
            )
        if arch.startswith("gemma") and "norm" in name:
            value = value + 1
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        writer.add_tensor(target, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", _CASES)
def test_logits(case: str, tmp_path: pathlib.Path) -> None:
    model_type, fields, understood = _CASES[case]
    reference = make_model(AutoConfig.for_model(model_type, **fields), tmp_path / "hf")
    path = tmp_path / "model.gguf"
    write_gguf(reference, path)
    config, params = load_gguf(path)
    tokens_BT = np.random.default_rng(1).integers(0, 96, (2, 20)).astype(np.int32)
    ours = np.asarray(make_ours(config).apply(params, tokens_BT).logits_BTV)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens_BT)).logits.numpy()
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    if understood:
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", attn_implementation="eager"
        )
        with torch.no_grad():
            logits = theirs.eval()(torch.tensor(tokens_BT)).logits.numpy()
        assert np.abs(ours - logits).max() <= 1e-4 * np.abs(logits).max()


def test_an_unknown_rope_table_is_refused(tmp_path: pathlib.Path) -> None:
    fields = {**_TINY, "head_dim": 64, "rope_parameters": {**_LLAMA3, "factor": 13.0}}
    write_gguf(make_model(AutoConfig.for_model("llama", **fields), tmp_path / "hf"), tmp_path / "model.gguf")
    with pytest.raises(InputError, match="rope_freqs"):
        load_gguf(tmp_path / "model.gguf")
