"""The GGUF container and what a file's metadata and tensors must say, on the real SmolLM2 and on small files."""

from __future__ import annotations

import pathlib

import gguf
import jax
import numpy as np
import pytest

from posttrain_jax.errors import InputError
from posttrain_jax.models.config import RopeConfig
from posttrain_jax.models.gguf import config_from_gguf, load_gguf
from posttrain_jax.models.gguf_file import GgufFile
from posttrain_jax.models.transformer import make_model
from posttrain_jax.sharding import make_mesh, tree_shardings


def write(
    path: pathlib.Path, *, arch: str = "llama", extra: dict | None = None, drop: str = "", add: str = ""
) -> None:
    """One layer, D = 32, two heads, F = 32, V = 8; Q8_0 embedding, float16 and float32 elsewhere."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {f"blk.0.{name}.weight": rng.normal(size=(32, 32)).astype(np.float16) for name in square}
    tensors |= {
        f"{name}.weight": np.ones(32, np.float32)
        for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
    }
    tensors["token_embd.weight"] = rng.normal(size=(8, 32)).astype(np.float32)
    if add:
        tensors[add] = np.ones(4, np.float32)
    for name, value in tensors.items():
        if name == "token_embd.weight":
            quantised = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif name != drop:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_reads_what_the_gguf_package_reads(smollm2_gguf: pathlib.Path) -> None:
    file, reference = GgufFile(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    ours = file.metadata
    theirs = {k: v.contents() for k, v in reference.fields.items() if not k.startswith("GGUF.")}
    assert ours == theirs
    assert {t.name for t in reference.tensors} == set(file.tensors)
    for tensor in reference.tensors[:12]:  # holds Q8_0, Q4_1 and F32
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.read(tensor.name), expected)


def test_smollm2_config(smollm2_gguf: pathlib.Path) -> None:
    config = config_from_gguf(GgufFile(smollm2_gguf))
    assert (config.n_layers, config.d_model, config.d_ff, config.n_heads, config.n_kv_heads) == (
        30,
        576,
        1536,
        9,
        3,
    )
    assert (config.head_dim, config.vocab_size, config.max_length, config.norm_eps) == (64, 49152, 8192, 1e-5)
    assert config.rope == RopeConfig(theta=100_000.0)
    assert config.tied_embeddings
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 2)


def test_gemma_config(gemma_gguf: pathlib.Path) -> None:
    config = config_from_gguf(GgufFile(gemma_gguf))
    assert config.model_type == "gemma3_text"
    assert [n for n, local in enumerate(config.local_layers) if not local] == [5, 11, 17]
    assert (config.sliding_window, config.rope.theta, config.rope_local.theta) == (512, 1e6, 1e4)
    assert config.embed_scale == pytest.approx(640**0.5)
    assert config.query_scale == pytest.approx(1 / 16)


def test_sharded_parameters_equal_whole_ones(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    config, whole = load_gguf(path)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = tree_shardings(make_model(config).abstract_params(), mesh)
    _, sharded = load_gguf(path, shardings)
    kernel = sharded["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "phi3"}, "'phi3' is not supported; known: gemma2, gemma3, llama"),
        ({"drop": "blk.0.ffn_up.weight"}, "lacks tensors.*blk.0.ffn_up.weight"),
        ({"add": "blk.0.attn_sinks"}, "unknown tensors.*blk.0.attn_sinks"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "'yarn' is not supported"),
        ({"extra": {"llama.expert_count": 8}}, "mixture-of-experts"),
        ({"extra": {"llama.attention.sliding_window": 4}}, "sliding window"),
        ({"extra": {"llama.rope.dimension_count": 8}, "drop": ""}, "lacks|shape|not supported"),
    ],
)
def test_what_cannot_be_right_is_refused(options: dict, message: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path / "m.gguf", **options)
    with pytest.raises(InputError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_damaged_files_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    whole = path.read_bytes()
    for size in (0, 10, 30, 200, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"m\.gguf"):
            load_gguf(path)
    path.write_bytes(b"PICKLED!" + whole)
    with pytest.raises(InputError, match="not a GGUF file"):
        load_gguf(path)
    path.write_bytes(whole[:4] + b"\x01" + whole[5:])
    with pytest.raises(InputError, match="version 1"):
        load_gguf(path)
    with pytest.raises(InputError, match="no such file"):
        load_gguf(tmp_path / "nowhere.gguf")


def test_a_length_beyond_the_file_is_refused_without_allocating(tmp_path: pathlib.Path) -> None:
    """A key whose string length claims 2**60 bytes."""
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(head + (2**60).to_bytes(8, "little") + b"x" * 64)
    with pytest.raises(InputError, match="damaged"):
        GgufFile(tmp_path / "m.gguf")
