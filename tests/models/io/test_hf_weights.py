"""Safetensors in and out: shapes, shards, dtypes, shardings, host memory, and files that are wrong."""

from __future__ import annotations

import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.core.trees import byte_count
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.hf_weights import load_safetensors, save_safetensors
from posttrain_jax.models.transformer import make_model

CONFIG = ModelConfig("qwen2", 24, 16, 3, 4, 2, 4, 32, qkv_bias=True, tied_embeddings=False)
TIED = ModelConfig("llama", 24, 16, 2, 4, 2, 4, 32)


def random_params(config: ModelConfig) -> PyTree:
    """Every leaf random: freshly made norms and biases are constant."""
    leaves, treedef = jax.tree.flatten(make_model(config).abstract_params())
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    save_safetensors(random_params(CONFIG), CONFIG, tmp_path)
    return tmp_path


def edit(folder: pathlib.Path, change: dict[str, np.ndarray | None]) -> None:
    """Changes (or, with None, removes) tensors of model.safetensors."""
    tensors = {**load_file(folder / "model.safetensors"), **change}
    save_file(
        {name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors"
    )


def test_names_shapes_and_orientation_are_hugging_faces(saved: pathlib.Path) -> None:
    params = random_params(CONFIG)
    tensors = load_file(saved / "model.safetensors")
    assert tensors["model.layers.2.mlp.down_proj.weight"].shape == (16, 32)
    np.testing.assert_array_equal(
        tensors["model.layers.2.mlp.down_proj.weight"].T, params["layers"]["mlp"]["down"]["kernel"][2]
    )
    bias = tensors["model.layers.1.self_attn.k_proj.bias"]
    np.testing.assert_array_equal(bias, params["layers"]["attn"]["k"]["bias"][1])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"])
    with safe_open(saved / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("config", [CONFIG, TIED])
@pytest.mark.parametrize("shard_bytes", [5e9, 4000])
def test_round_trip_is_bit_exact(config: ModelConfig, shard_bytes: float, tmp_path: pathlib.Path) -> None:
    params = random_params(config)
    save_safetensors(params, config, tmp_path, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes == 4000)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == byte_count(params)
        assert set(index["weight_map"].values()) == {file.name for file in files}
    again = load_safetensors(tmp_path, config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_and_parameters(stored: type, tmp_path: pathlib.Path) -> None:
    params = random_params(TIED)
    save_safetensors(params, TIED, tmp_path, dtype=stored)
    rounded = jax.tree.map(lambda leaf: leaf.astype(stored), params)
    whole = load_safetensors(tmp_path, TIED)
    jax.tree.map(
        lambda ours, want: np.testing.assert_array_equal(ours, want.astype(jnp.float32)), whole, rounded
    )
    half = load_safetensors(tmp_path, TIED, dtype=stored)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(stored)}
    jax.tree.map(np.testing.assert_array_equal, half, rounded)


def test_sharded_parameters_equal_whole_ones(saved: pathlib.Path) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = tree_shardings(make_model(CONFIG).abstract_params(), mesh)
    params = load_safetensors(saved, CONFIG, shardings)
    jax.tree.map(np.testing.assert_array_equal, params, random_params(CONFIG))
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == shardings["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_import_never_holds_a_second_copy(tmp_path: pathlib.Path) -> None:
    """A model of 138 MB in float32: what NumPy holds peaks below 1.5 of its largest leaves (33.5 MB)."""
    config = ModelConfig("llama", 1024, 512, 8, 8, 8, 64, 2048)
    model = make_model(config)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.abstract_params())
    total = byte_count(params)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    save_safetensors(params, config, tmp_path)
    del params
    tracemalloc.start()
    loaded = load_safetensors(tmp_path, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert byte_count(loaded) == total
    assert largest <= peak < 1.5 * largest < total / 2
    mesh = make_mesh(data=1, fsdp=8)
    tracemalloc.start()
    load_safetensors(tmp_path, config, tree_shardings(model.abstract_params(), mesh))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * largest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            r"lacks tensors.*model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        ({"lm_head.weight": None}, r"lacks tensors.*lm_head\.weight"),
        ({"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}, r"unknown tensors.*sinks"),
        ({"model.layers.3.mlp.up_proj.weight": np.ones((32, 16), np.float32)}, r"unknown tensors.*layers\.3"),
        ({"model.norm.weight": np.ones(8, np.float32)}, r"model\.norm\.weight \(8,\) instead of \(16,\)"),
        ({"model.norm.weight": np.ones(16, np.int8)}, r"model\.norm\.weight of type I8"),
    ],
)
def test_wrong_tensors_are_named(saved: pathlib.Path, change: dict, message: str) -> None:
    edit(saved, change)
    with pytest.raises(InputError, match=message):
        load_safetensors(saved, CONFIG)


def test_tensors_that_may_be_left_over(tmp_path: pathlib.Path) -> None:
    """Old RoPE buffers, an image tower beside the text model, and a tied head that equals the embedding."""
    params = random_params(TIED)
    save_safetensors(params, TIED, tmp_path)
    prefixed = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    prefixed["model.vision_tower.x.weight"] = np.ones(3, np.float32)
    prefixed["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    prefixed["lm_head.weight"] = prefixed["model.language_model.embed_tokens.weight"].copy()
    save_file(prefixed, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_safetensors(tmp_path, TIED), params)
    prefixed["lm_head.weight"][3, 3] += 1
    save_file(prefixed, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="tie_word_embeddings"):
        load_safetensors(tmp_path, TIED)


def test_pickles_missing_and_damaged_files(
    saved: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load_safetensors(empty, CONFIG)
    (empty / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*pickle.*save_pretrained"):
        load_safetensors(empty, CONFIG)
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_safetensors(saved, CONFIG)
    (saved / "model.safetensors").unlink()
    index = saved / "model.safetensors.index.json"
    for file in ("../secret.safetensors", "x" * 5000, "nul\0"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        with pytest.raises(InputError, match="the index names this file but it is not there: '"):
            load_safetensors(saved, CONFIG)
    for content in ('{"weight_map": ["a"]}', '{"weight_map": {"model.norm.weight": 7}}'):
        index.write_text(content)
        with pytest.raises(InputError, match="weight_map does not name a file for each tensor"):
            load_safetensors(saved, CONFIG)
    for content in ("[" * 100_000, '{"weight_map": ' + "9" * 5000 + "}", "[]"):
        index.write_text(content)
        with pytest.raises(InputError, match="nested too deeply|not valid JSON|JSON object was expected"):
            load_safetensors(saved, CONFIG)


def test_adapters_are_not_exported_by_mistake(tmp_path: pathlib.Path) -> None:
    params = random_params(TIED)
    params["layers"]["attn"]["q"]["lora_a"] = jnp.zeros((2, 16, 4))
    with pytest.raises(InputError, match="lora_a"):
        save_safetensors(params, TIED, tmp_path)


def test_parameters_can_be_donated(saved: pathlib.Path) -> None:
    """A step that is handed the imported parameters writes its own into the same memory."""
    params = load_safetensors(saved, CONFIG)
    before = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    after = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(step(params))}
    assert after == before
