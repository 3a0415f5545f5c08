"""Adapters in PEFT's format: written and read again, merged, and refused where they are more than plain LoRA."""

from __future__ import annotations

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import leaf_paths
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.peft import load_adapter, merge_error, merge_lora, save_adapter
from posttrain_jax.models.transformer import make_model

CONFIG = ModelConfig("llama", 24, 16, 3, 4, 2, 4, 32)
LORA = LoraConfig(rank=2, alpha=6.0, targets=("q", "v", "down"), rslora=True)


def random_params(lora: LoraConfig) -> PyTree:
    """Every leaf random, B as well."""
    leaves, treedef = jax.tree.flatten(make_model(CONFIG, lora=lora).abstract_params())
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten([0.2 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])


@pytest.fixture
def adapter(tmp_path: pathlib.Path) -> pathlib.Path:
    save_adapter(random_params(LORA), LORA, CONFIG, tmp_path, base_model="some/base")
    return tmp_path


def change_config(folder: pathlib.Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_names_and_fields_are_pefts(adapter: pathlib.Path) -> None:
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (2, 6.0, True)
    assert fields["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    assert fields["base_model_name_or_path"] == "some/base"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 3 * 2 * 3
    assert tensors["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"].shape == (2, 32)
    assert tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"].shape == (8, 2)


def test_round_trip(adapter: pathlib.Path) -> None:
    lora, leaves = load_adapter(adapter, CONFIG)
    assert lora == LORA
    params = random_params(LORA)
    assert set(leaf_paths(leaves)) == {path for path in leaf_paths(params) if "lora" in path}
    for block, name in (("attn", "q"), ("attn", "v"), ("mlp", "down")):
        for side in ("lora_a", "lora_b"):
            np.testing.assert_array_equal(
                leaves["layers"][block][name][side], params["layers"][block][name][side]
            )


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_unmerged(rslora: bool) -> None:
    """Scale: 6 / 2 = 3, or 6 / sqrt(2) with rsLoRA; the merged model has no adapter leaves."""
    lora = LoraConfig(2, 6.0, ("q", "v", "gate"), rslora)
    params = random_params(lora)
    tokens_BT = jnp.arange(12).reshape(2, 6)
    merged = merge_lora(params, lora)
    assert not any("lora" in path for path in leaf_paths(merged))
    want = params["layers"]["attn"]["q"]
    scale = 6 / 2**0.5 if rslora else 3.0
    by_hand = want["kernel"][1] + scale * (want["lora_a"][1] @ want["lora_b"][1])
    np.testing.assert_allclose(merged["layers"]["attn"]["q"]["kernel"][1], by_hand, rtol=1e-5, atol=1e-6)
    with_adapter = make_model(CONFIG, lora=lora).apply(params, tokens_BT).logits_BTV
    without = make_model(CONFIG).apply(merged, tokens_BT).logits_BTV
    np.testing.assert_allclose(with_adapter, without, atol=1e-4 * float(jnp.abs(without).max()))
    plain = make_model(CONFIG).apply({**params, "layers": params["layers"]}, tokens_BT).logits_BTV
    assert float(jnp.abs(plain - without).max()) > 1e-2 * float(jnp.abs(without).max())


def test_what_is_lost_in_bfloat16_by_hand() -> None:
    """bfloat16 has steps of 2^-7 from 1 to 2. A change of 2^-9 of 1 is rounded away: 100 %; of 2^-7 none is lost.

    Both together: lost (2^-9)^2 of (2^-9)^2 + (2^-7)^2, so sqrt(1 / 17) = 0.2425. In float32 nothing is lost.
    """
    lora = LoraConfig(1, 1.0, ("q",))

    def model(*changes: float) -> PyTree:
        q = {
            "kernel": jnp.ones((1, 1, len(changes))),
            "lora_a": jnp.ones((1, 1, 1)),
            "lora_b": jnp.array([[changes]]),
        }
        return {"layers": {"attn": {"q": q}}, "embed": {"embedding": jnp.ones((2, 1))}}

    for changes, lost in (((2**-9,), 1.0), ((2**-7,), 0.0), ((2**-9, 2**-7), 17**-0.5), ((0.0,), 0.0)):
        np.testing.assert_allclose(merge_error(model(*changes), lora, "bfloat16"), lost, rtol=1e-6)
        assert merge_error(model(*changes), lora, "float32") == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"bias": "all"}, "bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": None}, "r is None, but must be a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', but must be"),
        ({"r": 10**400}, "r is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"alora_invocation_tokens": [7, 8]}, r"alora_invocation_tokens = \[7, 8\] is not supported"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"kasa_config": {"gamma": 1}}, "kasa_config"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        (
            {"some_new_setting": 0.5},
            "some_new_setting = 0.5 is not supported .its effect is not known here",
        ),
        ({"r": 3}, r"has shape \(2, 16\), but the model needs \(3, 16\)"),
    ],
)
def test_more_than_plain_lora_is_refused(adapter: pathlib.Path, fields: dict, message: str) -> None:
    change_config(adapter, **fields)
    with pytest.raises(InputError, match=message):
        load_adapter(adapter, CONFIG)


def test_what_an_older_peft_did_not_write_is_taken_as_plain(adapter: pathlib.Path) -> None:
    path = adapter / "adapter_config.json"
    fields = json.loads(path.read_text())
    kept = ("peft_type", "r", "lora_alpha", "use_rslora")
    path.write_text(json.dumps({key: fields[key] for key in kept}))
    assert load_adapter(adapter, CONFIG)[0] == LORA
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    with pytest.raises(InputError, match="lora_alpha is 'absent'"):
        load_adapter(adapter, CONFIG)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "base_model.model.", "base_model.model.model.language_model."]
)
def test_names_of_the_text_model_with_other_prefixes(adapter: pathlib.Path, prefix: str) -> None:
    """A bare model, Gemma 3 with images before and since transformers 5."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace("base_model.model.model.", prefix): value for key, value in tensors.items()}, path)
    assert load_adapter(adapter, CONFIG)[0] == LORA


def test_tensors_that_do_not_fit_are_named(adapter: pathlib.Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": np.ones((2, 16), np.float32)}, path)
    with pytest.raises(InputError, match="lm_head"):
        load_adapter(adapter, CONFIG)
    for other in ("model.vision_tower.vision_model.encoder.", "visual.", "base_model.model.model."):
        text = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        theirs = text.replace("model.layers", f"{other}layers")
        save_file({**tensors, theirs: tensors[text]}, path)
        with pytest.raises(InputError, match=re.escape(theirs[:60])):
            load_adapter(adapter, CONFIG)
    twice = {key.replace("base_model.model.", ""): value for key, value in tensors.items()}
    save_file({**tensors, **twice}, path)
    with pytest.raises(InputError, match="two tensors for one module"):
        load_adapter(adapter, CONFIG)
    save_file({}, path)
    with pytest.raises(InputError, match="has no tensors"):
        load_adapter(adapter, CONFIG)
    fewer = {name: value for name, value in tensors.items() if "layers.1.self_attn.q_proj" not in name}
    save_file(fewer, path)
    with pytest.raises(InputError, match=r"q_proj\.lora_A is there for layers \[0, 2\]"):
        load_adapter(adapter, CONFIG)


def test_pickles_and_missing_files_are_refused(adapter: pathlib.Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        load_adapter(adapter, CONFIG)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match="no such file"):
        load_adapter(adapter, CONFIG)
