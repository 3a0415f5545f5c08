"""Adapters go both ways between this code and the `peft` package, with equal logits."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")
peft = pytest.importorskip("peft", reason="peft is not installed (extra [parity])")

from transformers import AutoModelForCausalLM

from parity.torch_families import make_config, make_model
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.config import LoraConfig
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.io.peft import _HARMLESS, _PLAIN, _READ, _check_settings, save_adapter
from posttrain_jax.models.transformer import Model
from posttrain_jax.models.transformer import make_model as make_ours

# peft asks transformers by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TOKENS = np.random.default_rng(2).integers(3, 96, (2, 12)).astype(np.int32)


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def our_logits(model: Model, params: PyTree) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, t: model.apply(p, t).logits_BTV)(params, TOKENS))


def assert_close(ours: np.ndarray, reference: np.ndarray) -> None:
    assert np.abs(np.asarray(ours) - reference).max() <= 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("family", ["smollm2", "gemma3", "qwen3"])
def test_peft_loads_what_we_save(family: str, tmp_path: pathlib.Path) -> None:
    base = make_model(make_config(family), tmp_path / "base")
    plain = torch_logits(base)
    loaded = load_model(str(tmp_path / "base"))
    lora = LoraConfig(rank=4, alpha=8.0, targets=("q", "k", "o", "up", "down"), rslora=family == "qwen3")
    model = make_ours(loaded.config, lora=lora)
    shapes = model.abstract_params()
    random = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), shapes)
    leaves = {
        "layers": {
            block: {
                name: {side: random["layers"][block][name][side] for side in ("lora_a", "lora_b")}
                for name in names
            }
            for block, names in (("attn", ("q", "k", "o")), ("mlp", ("up", "down")))
        }
    }
    params = combine(loaded.params, leaves)
    save_adapter(params, lora, loaded.config, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    theirs = torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert np.abs(theirs - plain).max() > 1e-2 * np.abs(plain).max()
    assert_close(our_logits(model, params), theirs)

    # the adapter's folder is a MODEL too
    adapted = load_model(str(tmp_path / "adapter"))
    assert adapted.lora == lora
    assert_close(our_logits(adapted.model, adapted.params), theirs)

    # and merged on export it is a plain model
    export_hf(tmp_path / "merged", config=loaded.config, params=params, tokenizer=None, lora=lora)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_close(torch_logits(merged), theirs)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves(targets: list[str] | str, rslora: bool, tmp_path: pathlib.Path) -> None:
    base = make_model(make_config("llama3"), tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, use_rslora=rslora, lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs = torch_logits(model)
    model.save_pretrained(tmp_path / "adapter")
    ours = load_model(str(tmp_path / "adapter"))
    assert ours.lora.rank == 3
    assert len(ours.lora.targets) == (2 if targets == ["q_proj", "v_proj"] else 7)
    assert_close(our_logits(ours.model, ours.params), theirs)


def test_every_setting_of_peft_is_known() -> None:
    """A setting of an installed PEFT is read here, known to be harmless, or refused: a new one must be looked at."""
    fresh = peft.LoraConfig(task_type="CAUSAL_LM", r=3).to_dict()
    _check_settings({**fresh, "peft_type": "LORA"}, pathlib.Path("adapter_config.json"))
    refused = {
        "alora_invocation_tokens",
        "arrow_config",
        "corda_config",
        "kasa_config",
        "lora_bias",
        "lora_ga_config",
    }
    refused |= {"megatron_config", "monteclora_config", "use_bdlora", "use_qalora", "velora_config"}
    assert set(fresh) <= {*_READ, *_HARMLESS, *_PLAIN, *refused}
