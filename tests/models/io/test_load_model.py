"""What a MODEL may be, what is refused, and the way out: export and a run's model folder."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tasks import spec_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import posttrain_jax
from configs.base import base_config
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import PyTree, TrainState
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.export import export_hf, put_in_place, write_model_folder
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.io.peft import save_adapter
from posttrain_jax.models.io.source import base_name, has_adapter, load_config, resolve
from posttrain_jax.models.transformer import make_model
from posttrain_jax.run.checkpoint import Checkpoints

CONFIG = ModelConfig(
    "llama", 6, 16, 2, 4, 2, 4, 32, query_scale=0.5, bos_token_id=0, eos_token_ids=(1,), pad_token_id=1
)
TEMPLATE = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"


def test_a_run_without_a_checkpoint_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"algorithm": "sft", "model": {"init": "random"}}))
    with pytest.raises(InputError, match="the run in this workdir has no checkpoint yet"):
        resolve(str(tmp_path))


@pytest.fixture(scope="module")
def params() -> PyTree:
    return make_model(CONFIG).init(jax.random.key(0))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<s>": 0, "</s>": 1, "<turn>": 2, "question": 3, "posttrain": 4, "<unk>": 5}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<turn>"],
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def exported(params: PyTree, tokenizer: PreTrainedTokenizerFast, tmp_path: pathlib.Path) -> pathlib.Path:
    export_hf(tmp_path / "model", config=CONFIG, params=params, tokenizer=tokenizer)
    return tmp_path / "model"


def test_a_folder_with_all_that_belongs_to_it(exported: pathlib.Path, params: PyTree) -> None:
    loaded = posttrain_jax.load(str(exported))
    # what ends a generation now holds the end-of-turn token of the chat template
    assert loaded.config.eos_token_ids == (1, 2)
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.chat_template == TEMPLATE
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    out = loaded.apply(loaded.params, np.array([[3, 4, 2]]))
    assert out.logits_BTV.shape == (1, 3, 6)
    assert (loaded.source.kind, loaded.lora.rank) == ("hf", 0)


def test_without_a_tokenizer(params: PyTree, tmp_path: pathlib.Path) -> None:
    export_hf(tmp_path / "m", config=CONFIG, params=params, tokenizer=None)
    assert load_model(str(tmp_path / "m")).tokenizer is None


def test_dtypes_and_meshes(exported: pathlib.Path) -> None:
    half = load_model(str(exported), dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"float32"}
    assert half.apply(half.params, np.array([[3]])).hidden_BTD.dtype == "bfloat16"
    stored = load_model(str(exported), param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored.params)} == {"bfloat16"}
    sharded = load_model(str(exported), mesh=make_mesh(fsdp=8, data=1))
    kernel = sharded.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_export_in_bfloat16_and_with_what_the_model_came_with(
    exported: pathlib.Path, tokenizer: PreTrainedTokenizerFast, tmp_path: pathlib.Path
) -> None:
    loaded = load_model(str(exported))
    assert loaded.original is not None
    export_hf(
        tmp_path / "half",
        config=loaded.config,
        params=loaded.params,
        tokenizer=tokenizer,
        original={**loaded.original, "initializer_range": 0.5},
        generation={**loaded.generation, "temperature": 0.6},
        dtype="bfloat16",
    )
    fields = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (fields["initializer_range"], fields["torch_dtype"]) == (0.5, "bfloat16")
    assert json.loads((tmp_path / "half" / "generation_config.json").read_text())["temperature"] == 0.6
    again = load_model(str(tmp_path / "half"))
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), loaded.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, rounded)


def test_export_is_all_or_nothing(exported: pathlib.Path, params: PyTree, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="something already"):
        export_hf(exported, config=CONFIG, params=params, tokenizer=None)
    broken = {**params, "layers": {**params["layers"], "extra": {"scale": np.ones(3)}}}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="extra/scale"):
        export_hf(tmp_path / "new", config=CONFIG, params=broken, tokenizer=None)
    with pytest.raises(InputError, match="extra/scale"):
        export_hf(exported, config=CONFIG, params=broken, tokenizer=None, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    export_hf(exported, config=CONFIG, params=params, tokenizer=None, overwrite=True)
    assert not (exported / "tokenizer.json").exists()  # replaced as a whole
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export_hf(tmp_path / "file" / "below", config=CONFIG, params=params, tokenizer=None)


def test_what_was_there_comes_back_when_it_cannot_be_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("old")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "scratch/never made", tmp_path / "model")
    assert (tmp_path / "model/weights").read_text() == "old"


def test_model_folder_of_a_run_has_no_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: pathlib.Path
) -> None:
    write_model_folder(tmp_path / "model", config=CONFIG, tokenizer=tokenizer)
    assert not list((tmp_path / "model").glob("*.safetensors"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model": {"lora": {"rank": 0}}, "train": {}}))
    source = resolve(f"{tmp_path}@30")
    assert (source.kind, source.path, source.step) == ("workdir", tmp_path, 30)
    assert load_config(resolve(str(tmp_path))).eos_token_ids == (1, 2)


def test_an_adapter_is_a_model(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lora = LoraConfig(2, 4.0, ("q",))
    adapted = make_model(CONFIG, lora=lora).init(jax.random.key(3))
    save_adapter(adapted, lora, CONFIG, tmp_path / "adapter", base_model=str(exported))
    loaded = load_model(str(tmp_path / "adapter"))
    assert loaded.lora == lora
    assert loaded.tokenizer is not None
    assert "lora_a" in loaded.params["layers"]["attn"]["q"]
    assert has_adapter(resolve(str(tmp_path / "adapter"))) and not has_adapter(resolve(str(exported)))
    config = base_config()
    config.model.init, config.model.lora.rank = str(tmp_path / "adapter"), 4
    config.model.tokenizer, config.data.train = str(exported), "rows.jsonl"
    with pytest.raises(InputError, match=r"adapter of rank 2, alpha 4, .* the config says rank 4, alpha 16"):
        spec_of(config).init_params(make_mesh(), jax.random.key(0))
    for base, message in (
        ("", "names no base_model_name_or_path"),
        (str(tmp_path / "adapter"), "the adapter itself; write the base model there"),
        (str(tmp_path / "other"), "an adapter too; merge that into its base model first"),
    ):
        save_adapter(adapted, lora, CONFIG, tmp_path / "adapter", base_model=base)
        save_adapter(adapted, lora, CONFIG, tmp_path / "other", base_model=str(tmp_path / "adapter"))
        for load in (load_model, lambda name: load_config(resolve(name))):
            with pytest.raises(InputError, match=message):
                load(str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="leads back to itself"):
        base_name(resolve(str(tmp_path / "adapter")))
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**fields, "base_model_name_or_path": 7})
    )
    with pytest.raises(InputError, match="base_model_name_or_path of adapter_config.json is 7, but must be"):
        load_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}/nowhere", "no such file or folder"),
        ("{tmp}/nowhere.gguf", "no such file or folder"),
        ("{tmp}", "no config.json"),
        ("{tmp}@3", "not a workdir"),
        ("{tmp}/weights.bin", "must be a .gguf"),
        ("posttrain-nobody/no-such-model", "Hub did not give it"),
        ("", "no such file or folder|no config.json"),
    ],
)
def test_what_is_no_model(name: str, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        resolve(name.format(tmp=tmp_path))


def test_a_workdir_is_a_model(
    params: PyTree, tokenizer: PreTrainedTokenizerFast, tmp_path: pathlib.Path
) -> None:
    """A LoRA run: adapter trained, the rest frozen, two checkpoints; and an export of the newest, merged."""
    lora = LoraConfig(2, 4.0, ("q",), True)
    whole = make_model(CONFIG, lora=lora).init(jax.random.key(3))
    trained, frozen = partition(whole, lambda path: "lora" in path)
    write_model_folder(tmp_path / "model", config=CONFIG, tokenizer=tokenizer)
    fields = {"rank": 2, "alpha": 4.0, "targets": ["q"], "rslora": True}
    (tmp_path / "config.json").write_text(json.dumps({"model": {"lora": fields}, "train": {}}))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_frozen(frozen)
    zero = jnp.zeros((), jnp.int32)
    for step in (1, 2):
        state = TrainState(
            step=zero + step,
            params=jax.tree.map(lambda leaf, step=step: leaf + step, trained),
            frozen=frozen,
            opt_state={},
            ema={},
            key=jax.random.key(0),
            skipped=zero,
            skipped_in_row=zero,
        )
        checkpoints.save(state, {"git": ""}, {})
    checkpoints.close()
    for name, step in ((str(tmp_path), 2), (f"{tmp_path}@1", 1)):
        loaded = load_model(name)
        assert (loaded.source.kind, loaded.source.step, loaded.lora) == ("workdir", step, lora)
        assert loaded.tokenizer is not None
        want = combine(jax.tree.map(lambda leaf, step=step: leaf + step, trained), frozen)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, want)
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        load_model(f"{tmp_path}@7")
    last = load_model(str(tmp_path))
    export_hf(
        tmp_path / "out",
        config=last.config,
        params=last.params,
        tokenizer=None,
        lora=last.lora,
        original=last.original,
    )
    tokens_BT = np.array([[3, 4, 2]])
    merged = load_model(str(tmp_path / "out"))
    np.testing.assert_allclose(
        merged.apply(merged.params, tokens_BT).logits_BTV,
        last.apply(last.params, tokens_BT).logits_BTV,
        rtol=1e-4,
        atol=1e-4,
    )
