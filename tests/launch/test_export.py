"""launch.export: a run, its adapter or its average as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, launch, save_tiny_model

from launch.export import export
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.optim import OptimOptions, make_optimizer, make_schedule
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.updates import new_state
from posttrain_jax.models.config import LoraConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import export_hf, write_model_folder
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import make_model
from posttrain_jax.run.checkpoint import Checkpoints

TOKENS = np.arange(1, 20)[None]
LORA = LoraConfig(rank=2, alpha=8.0, targets=("q", "down"))


def save_run(workdir, *, lora: LoraConfig, ema: bool = False):
    """A workdir with the checkpoints 1 and 2 as a run leaves it; returns the parameters of both."""
    model = make_model(CONFIG, lora=lora)
    params = model.init(jax.random.key(0))
    trained, frozen = partition(params, lambda path: not lora.rank or "lora" in path)
    schedule = make_schedule(
        OptimOptions(schedule="constant", lr=0.1, warmup=0.0, min_lr_ratio=0.0, decay_share=0.1), steps=2
    )
    optimizer = make_optimizer(
        OptimOptions(
            name="sgd", beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0, momentum=0.0
        ),
        schedule,
    )
    state = new_state(trained, frozen, jax.random.key(0), optimizer, ema=ema)
    write_model_folder(workdir / "model", config=CONFIG, tokenizer=byte_tokenizer())
    fields = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": list(lora.targets),
        "rslora": False,
    }
    (workdir / "config.json").write_text(json.dumps({"model": {"init": "base/folder", "lora": fields}}))
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save_frozen(frozen)
    steps = {}
    for step in (1, 2):
        noise = jax.tree.map(
            lambda leaf, step=step: leaf + 0.02 * jax.random.normal(jax.random.key(step), leaf.shape),
            trained,
        )
        average = jax.tree.map(lambda leaf: 0.5 * leaf, noise) if ema else {}
        state = dataclasses.replace(state, step=jnp.int32(step), params=noise, ema=average)
        checkpoints.save(state, {}, {})
        steps[step] = combine(noise, frozen)
    checkpoints.close()
    return model, steps


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora_run")
    return (workdir, *save_run(workdir, lora=LORA))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("full_run")
    return (workdir, *save_run(workdir, lora=LoraConfig(), ema=True))


def logits_of(folder) -> np.ndarray:
    loaded = load_model(str(folder))
    return np.asarray(loaded.apply(loaded.params, TOKENS).logits_BTV)


def test_a_run_is_exported_bit_for_bit_at_the_step_asked_for(full_run, tmp_path):
    workdir, _, steps = full_run
    assert export(str(workdir), tmp_path / "last") == 2
    assert export(f"{workdir}@1", tmp_path / "first") == 1
    for name, step in (("last", 2), ("first", 1)):
        loaded = load_model(str(tmp_path / name))
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded.params, steps[step]))
    assert load_model(str(tmp_path / "last")).tokenizer.chat_template
    generation = json.loads((tmp_path / "last" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == byte_tokenizer().eos_token_id
    with pytest.raises(InputError, match="no checkpoint of step 5"):
        export(f"{workdir}@5", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_average_and_the_type_can_be_chosen(full_run, tmp_path, capsys):
    workdir, _, steps = full_run
    export(str(workdir), tmp_path / "ema", ema=True)
    loaded = load_model(str(tmp_path / "ema"))
    np.testing.assert_allclose(
        loaded.params["embed"]["embedding"], 0.5 * steps[2]["embed"]["embedding"], rtol=1e-6
    )
    shutil.copytree(workdir, tmp_path / "run")
    described = json.loads((workdir / "config.json").read_text()) | {"eval": {"weights": "ema"}}
    (tmp_path / "run/config.json").write_text(json.dumps(described))
    for ema, taken, says in ((None, "ema", "moving average"), (False, "raw", "last weights")):
        capsys.readouterr()
        export(str(tmp_path / "run"), tmp_path / taken, ema=ema, overwrite=True)
        assert says in capsys.readouterr().out
        got = load_model(str(tmp_path / taken)).params["embed"]["embedding"]
        same = got == (loaded.params if taken == "ema" else steps[2])["embed"]["embedding"]
        assert bool(same.all())
        assert load_model(str(tmp_path / "run"), ema=ema).source.weights == taken
    export(str(workdir), tmp_path / "half", dtype="bfloat16")
    stored = load_model(str(tmp_path / "half")).params["embed"]["embedding"]
    np.testing.assert_array_equal(
        stored, steps[2]["embed"]["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    )
    with pytest.raises(InputError, match="float16 is not a type"):
        export(str(workdir), tmp_path / "other", dtype="float16")


def test_an_adapter_is_merged_or_exported_alone(lora_run, tmp_path):
    workdir, model, steps = lora_run
    expected = np.asarray(model.apply(steps[2], TOKENS).logits_BTV)
    export(str(workdir), tmp_path / "merged")
    np.testing.assert_allclose(logits_of(tmp_path / "merged"), expected, atol=1e-5)

    export(str(workdir), tmp_path / "adapter", adapter_only=True)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["base_model_name_or_path"]) == (2, "base/folder")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    # On its base model it is the run again.
    base, _ = partition(steps[2], lambda path: "lora" not in path)
    export_hf(tmp_path / "base", config=CONFIG, params=base, tokenizer=byte_tokenizer())
    fields["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    np.testing.assert_allclose(logits_of(tmp_path / "adapter"), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_finds_the_base_of_an_exported_adapter(lora_run, tmp_path, monkeypatch):
    """The base is named relative to the folder of the training; PEFT loads it from anywhere. peft cuts the vocabulary
    to the tokenizer's."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra [parity])")
    workdir, model, steps = lora_run
    base, _ = partition(steps[2], lambda path: "lora" not in path)
    monkeypatch.chdir(tmp_path)
    export_hf(tmp_path / "base" / "folder", config=CONFIG, params=base, tokenizer=byte_tokenizer())
    export(str(workdir), tmp_path / "adapter", adapter_only=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    ours = np.asarray(model.apply(steps[2], TOKENS).logits_BTV)[..., : logits.shape[-1]]
    np.testing.assert_allclose(logits, ours, atol=1e-4)


@pytest.mark.parametrize(
    ("init", "base", "words"),
    [
        ("base.gguf", "{here}/base.gguf", "PEFT cannot load the base model {here}/base.gguf"),
        ("run@2", "{here}/run@2", "PEFT cannot load the base model {here}/run@2"),
        ("random", None, ""),
    ],
)
def test_a_base_that_peft_cannot_load_is_named(
    lora_run, full_run, tmp_path, monkeypatch, capsys, init, base, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    shutil.copytree(full_run[0], tmp_path / "run")
    shutil.copytree(lora_run[0], tmp_path / "adapted")
    path = tmp_path / "adapted" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({"model": {**fields["model"], "init": init}}))
    export(str(tmp_path / "adapted"), tmp_path / "out", adapter_only=True)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == (base and base.format(here=tmp_path))
    err = capsys.readouterr().err
    assert words.format(here=tmp_path) in err and (words != "") == ("PEFT" in err)


def test_an_adapter_that_bfloat16_rounds_away_is_said(tmp_path, caplog):
    """A measured number, as the exported weights show it; float32 loses nothing and says nothing."""
    params = make_model(CONFIG, lora=LORA).init(jax.random.key(0))
    base = make_model(CONFIG).init(jax.random.key(0))
    for block, name in (("attn", "q"), ("mlp", "down")):
        leaf = params["layers"][block][name]
        leaf["lora_b"] = 1e-4 * jax.random.normal(jax.random.key(1), leaf["lora_b"].shape)
        base["layers"][block][name] = {"kernel": leaf["kernel"]}
    for dtype in ("float32", "bfloat16"):
        export_hf(tmp_path / dtype, config=CONFIG, params=params, tokenizer=None, lora=LORA, dtype=dtype)
        assert ("bfloat16" in caplog.text) == (dtype == "bfloat16")
    said = float(caplog.text.split("what the adapter changes is off by ")[1].split(" %")[0])
    lost = change = 0.0
    for block, name in (("attn", "q"), ("mlp", "down")):
        before = base["layers"][block][name]["kernel"]
        whole, half = (
            load_model(str(tmp_path / dtype)).params["layers"][block][name]["kernel"]
            for dtype in ("float32", "bfloat16")
        )
        lost += jnp.sum((half - before.astype("bfloat16").astype("float32") - (whole - before)) ** 2)
        change += jnp.sum((whole - before) ** 2)
    assert said > 20
    np.testing.assert_allclose(said, 100 * np.sqrt(lost / change), rtol=0.01)


def test_an_adapter_that_was_trained_on_belongs_to_the_first_base(lora_run, tmp_path):
    """A run on the adapter of a run on an adapter folder."""
    export(str(lora_run[0]), tmp_path / "adapter", adapter_only=True)
    shutil.copytree(lora_run[0], tmp_path / "second")
    shutil.copytree(lora_run[0], tmp_path / "third")
    for name, init in (("second", tmp_path / "adapter"), ("third", f"{tmp_path}/second@2")):
        path = tmp_path / name / "config.json"
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({"model": {**fields["model"], "init": str(init)}}))
    export(str(tmp_path / "third"), tmp_path / "out", adapter_only=True)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "base/folder"


def test_a_run_without_adapter_has_none_to_export(full_run, tmp_path):
    with pytest.raises(InputError, match="no LoRA adapter"):
        export(str(full_run[0]), tmp_path / "adapter", adapter_only=True)
    assert not (tmp_path / "adapter").exists()


def test_what_is_there_is_not_overwritten_unless_asked(full_run, tmp_path):
    workdir, _, _ = full_run
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty; .*--overwrite"):
        export(str(workdir), out)
    assert (out / "notes.txt").read_text() == "mine"
    export(str(workdir), out, overwrite=True)
    assert (out / "model.safetensors").is_file() and not (out / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left beside it
    with pytest.raises(InputError, match="holds the model that is exported"):
        export(str(workdir), workdir.parent, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        export(str(workdir), tmp_path / "file")


def test_any_model_can_be_exported_but_only_a_run_has_an_average(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    assert export(str(folder), tmp_path / "copy") is None
    np.testing.assert_array_equal(logits_of(tmp_path / "copy"), logits_of(folder))
    with pytest.raises(InputError, match="is no workdir"):
        export(str(folder), tmp_path / "average", ema=True)
    with pytest.raises(InputError, match="is no workdir"):
        load_model(str(folder), ema=True)


def test_a_run_without_an_average_has_none_to_export(lora_run, tmp_path):
    with pytest.raises(InputError, match="holds no moving average of the weights"):
        export(str(lora_run[0]), tmp_path / "average", ema=True)


def test_a_reward_model_says_its_bias_and_cannot_chat(tmp_path):
    head = score_head_params(jax.random.key(1), CONFIG.d_model, init="normal")
    params = {**make_model(CONFIG).init(jax.random.key(0)), "score_head": {**head, "bias": jnp.float32(-0.5)}}
    export_hf(tmp_path / "model", config=CONFIG, params=params, tokenizer=byte_tokenizer())
    done = launch("export", f"--workdir={tmp_path}/model", f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("\n")[1]
    assert said == "Its scores are those of transformers + -0.5 (score_bias in its config.json)."
    refused = launch("chat", f"--model={tmp_path}/out")
    assert refused.returncode == 2
    assert "is a reward model: it gives scores" in refused.stderr and "Traceback" not in refused.stderr


def test_from_the_command_line(full_run, tmp_path):
    done = launch("export", f"--workdir={full_run[0]}@1", f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"Exporting the last weights of {full_run[0]}@1.",
        f"The model of step 1 lies in {tmp_path}/out.",
    ]
    for arguments, words in (
        ((), "--workdir and --out are needed"),
        ((f"--workdir={full_run[0]}", f"--out={tmp_path}/out"), "is not empty"),
        (("--workdir=no/such/run", f"--out={tmp_path}/new"), "no such file or folder"),
    ):
        done = launch("export", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr and "Traceback" not in done.stderr
