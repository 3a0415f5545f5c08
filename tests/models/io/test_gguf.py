"""The GGUF container and what a file's metadata and tensors must say, on the real SmolLM2 and on small files."""

from __future__ import annotations

import pathlib
import struct

import gguf
import jax
import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.models.config import RopeConfig
from posttrain_jax.models.io.gguf import config_from_gguf, load_gguf
from posttrain_jax.models.io.gguf_file import GgufFile
from posttrain_jax.models.transformer import make_model


def write(
    path: pathlib.Path, *, arch: str = "llama", extra: dict | None = None, drop: str = "", add: str = ""
) -> None:
    """One layer, D = 32, two heads, F = 32, V = 8; Q8_0 embedding, float16 and float32 elsewhere."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    sizes = {"context_length": 16, "embedding_length": 32, "feed_forward_length": 32, "block_count": 1}
    sizes |= {"attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    for key, value in ({f"{arch}.{name}": size for name, size in sizes.items()} | (extra or {})).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            ways = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
            ways.get(type(value), writer.add_uint32)(key, value)
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
            quantized = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
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


def header(pairs: list[tuple[str, int, bytes]], tensors: bytes = b"", n_tensors: int = 0) -> bytes:
    """The bytes of a GGUF file with these keys: (name, type, value as the file holds it)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(pairs))
    for name, kind, value in pairs:
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value
    return out + tensors + bytes(64)


def nested(depth: int) -> bytes:
    """Arrays of one array each, `depth` deep, around the number 7."""
    return struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQI", 4, 1, 7)


def test_headers_of_no_sense_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.gguf"
    long_rows = struct.pack("<Q1sI2QIQ", 1, b"t", 2, 2**40, 2**40, 0, 0)
    odd_rows = struct.pack("<Q1sIQIQ", 1, b"t", 1, 33, int(gguf.GGMLQuantizationType.Q8_0), 0)
    for content, message in (
        (header([("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
        (header([("general.alignment", 6, struct.pack("<f", 8.0))]), "general.alignment is 8.0"),
        (header([("deep", 9, nested(5))]), "more than 4 arrays in each other"),
        (header([("deep", 9, nested(5000))]), "more than 4 arrays in each other"),
        (header([], long_rows, 1), "ends inside tensor t"),
        (header([], odd_rows, 1), "no whole blocks of 32"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            GgufFile(path)
    path.write_bytes(header([("deep", 9, nested(3))]))
    assert GgufFile(path).metadata == {"deep": [[[7]]]}


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeConfig(1e4, "linear", 4.0)),
        ({"rope.scaling.factor": 4.0}, RopeConfig(1e4, "linear", 4.0)),
        ({"rope.scale_linear": 4.0}, RopeConfig(1e4, "linear", 4.0)),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, RopeConfig(1e4, "linear", 4.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, RopeConfig(1e4)),
        ({"rope.scaling.type": "linear"}, RopeConfig(1e4)),
        ({"rope.scaling.factor": 1.0}, RopeConfig(1e4)),
    ],
)
def test_rope_scaling_is_read_as_llama_cpp_reads_it(
    scaling: dict, rope: RopeConfig, tmp_path: pathlib.Path
) -> None:
    """llama.cpp: no type is linear; scale_linear is the old name of scaling.factor; type none never scales."""
    write(tmp_path / "m.gguf", extra={f"llama.{key}": value for key, value in scaling.items()})
    assert config_from_gguf(GgufFile(tmp_path / "m.gguf")).rope == rope


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", "two", "block_count is 'two', but must be a positive whole number"),
        ("llama.block_count", 0, "block_count is 0, but"),
        ("llama.block_count", 2**31, "the file has 11 tensors"),
        ("llama.attention.head_count_kv", 0, "head_count_kv is 0"),
        ("llama.attention.head_count", [2, 2], "differs between layers"),
        ("llama.attention.head_count_kv", 4, "2 attention heads cannot share 4 key-value heads"),
        ("llama.attention.key_length", 3, "head width is 3, but RoPE turns pairs"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "epsilon is nan, but must be a positive"),
        ("llama.rope.freq_base", -1.0, "freq_base is -1.0"),
        ("llama.rope.scaling.factor", -4.0, "factor is -4.0"),
        ("llama.rope.scaling.attn_factor", 2.0, "attn_factor is 2.0, which is not supported"),
        ("llama.rope.freq_base_swa", 5.0, "freq_base_swa is 5.0, which is not supported"),
        ("llama.logit_scale", 0.5, "logit_scale is 0.5, which is not supported"),
        ("llama.attention.causal", False, "causal is False, which is not supported"),
        ("llama.residual_scale", 0.25, "residual_scale is 0.25, which is not supported"),
        ("tokenizer.ggml.eos_token_id", "2", "eos_token_id is '2', but must be a whole number"),
    ],
)
def test_metadata_that_is_wrong_or_not_understood_is_refused_by_name(
    key: str, value: object, message: str, tmp_path: pathlib.Path
) -> None:
    write(tmp_path / "m.gguf", extra={key: value})
    with pytest.raises(InputError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_metadata_that_says_what_is_done_anyway_is_taken(tmp_path: pathlib.Path) -> None:
    plain = {"llama.attention.causal": True, "llama.rope.scaling.attn_factor": 1.0, "llama.expert_count": 0}
    write(tmp_path / "m.gguf", extra={**plain, "llama.vocab_size": 8, "llama.residual_scale": 0.0})
    load_gguf(tmp_path / "m.gguf")
    ids = {"eos_token_id": 7, "bos_token_id": 8, "padding_token_id": 2**32 - 1}
    write(tmp_path / "m.gguf", extra={f"tokenizer.ggml.{name}": index for name, index in ids.items()})
    config = config_from_gguf(GgufFile(tmp_path / "m.gguf"))
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((7,), None, None)


def test_gemma_windows_and_caps_as_llama_cpp_reads_them(tmp_path: pathlib.Path) -> None:
    """Gemma 3: every sixth layer global unless a period or a list says otherwise; Gemma 2's window is 4096."""
    path, window = tmp_path / "m.gguf", {"gemma3.attention.sliding_window": 4, "gemma3.block_count": 4}
    for pattern, local in ((2, (True, False) * 2), ([True, False, False, True], (True, False, False, True))):
        write(path, arch="gemma3", extra={**window, "gemma3.attention.sliding_window_pattern": pattern})
        assert config_from_gguf(GgufFile(path)).local_layers == local
    write(path, arch="gemma3", extra={**window, "gemma3.final_logit_softcapping": 3.0})
    config = config_from_gguf(GgufFile(path))
    assert (config.local_layers, config.logits_softcap, config.attn_softcap) == ((True,) * 4, 3.0, 0.0)
    write(path, arch="gemma3", extra={**window, "gemma3.attn_logit_softcapping": 3.0})
    with pytest.raises(InputError, match=r"attn_logit_softcapping is 3\.0, which is not supported"):
        config_from_gguf(GgufFile(path))
    write(path, arch="gemma2")
    assert config_from_gguf(GgufFile(path)).sliding_window == 4096
