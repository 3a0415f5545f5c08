"""Checkpoints that are damaged, do not fit, move to another mesh, or meet a full disk."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_points import ROOT
from tasks import spec_of, task_of

from configs.sft.smollm2_135m import TINY_MODEL, get_config
from contracts.tiny import LLAMA, make_mesh, make_trainer, random_rows
from launch.train import run
from posttrain_jax.core.checkpoint_params import restore_params
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import leaf_paths
from posttrain_jax.core.types import TrainState
from posttrain_jax.core.workdir import MANIFEST, completed_steps, damage
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.transformer import make_model
from posttrain_jax.run import checkpoint
from posttrain_jax.run.checkpoint import Checkpoints


def tiny_config(**changes):
    config = get_config("tiny")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.eval.prompts = ()
    config.eval.every = 0
    config.log.tensorboard = False
    config.train.steps = 6
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


def shapes_of(config):
    return spec_of(config).model.abstract_params()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A complete run of 6 steps with the checkpoints 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("damage") / "run"
    run(tiny_config(checkpoint__every=2, checkpoint__keep=3), workdir)
    return workdir


@pytest.fixture
def workdir(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def abstract_state(workdir: Path) -> TrainState:

    return task_of(tiny_config(checkpoint__every=2, checkpoint__keep=3), workdir).abstract_state


@pytest.fixture(scope="module")
def like(finished: Path, tmp_path_factory) -> TrainState:
    return abstract_state(tmp_path_factory.mktemp("like"))


def biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(folder: Path) -> None:
    path = biggest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = biggest(folder)
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "byte_in_params": (lambda step: flip_a_byte(step / "params"), "the contents of its file params/"),
    "byte_in_optimizer": (
        lambda step: flip_a_byte(step / "optimizer"),
        "the contents of its file optimizer/",
    ),
    "byte_in_meta": (lambda step: flip_a_byte(step / "meta"), "the contents of its file meta/"),
    "truncated": (lambda step: truncate(step / "params"), "bytes instead of"),
    "file_gone": (lambda step: biggest(step / "params").unlink(), "is gone"),
    "item_gone": (lambda step: shutil.rmtree(step / "optimizer"), "it lacks optimizer"),
    "manifest_gone": (lambda step: (step / "manifest.json").unlink(), "its manifest.json is gone"),
    "manifest_not_json": (
        lambda step: (step / "manifest.json").write_text("{"),
        "its manifest.json is not what was written",
    ),
    "manifest_empty": (
        lambda step: (step / "manifest.json").write_text("{}"),
        "its manifest.json does not name its file meta/",
    ),
    "manifest_not_an_object": (
        lambda step: (step / "manifest.json").write_text("[1]"),
        "its manifest.json is not what was written",
    ),
    "emptied": (
        lambda step: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in step.iterdir()],
        "it lacks",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, workdir, like, caplog):
    do_damage, says = DAMAGES[name]
    do_damage(workdir / "checkpoints/6")
    caplog.set_level(logging.ERROR, logger=checkpoint.log.name)
    restored = Checkpoints(workdir, keep=3).restore(like)
    assert restored.step == int(restored.state.step) == 4
    (record,) = caplog.records
    assert str(workdir / "checkpoints/6") in record.getMessage()
    assert says in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_the_same(finished: Path, workdir: Path, capsys):
    flip_a_byte(workdir / "checkpoints/6/params")
    run(tiny_config(checkpoint__every=2, checkpoint__keep=3), workdir)
    assert "Resuming from step 4" in capsys.readouterr().out
    shapes = shapes_of(tiny_config())
    for path in (finished, workdir):
        assert damage(path / "checkpoints/6") is None
    jax.tree.map(
        np.testing.assert_array_equal, restore_params(workdir, shapes)[0], restore_params(finished, shapes)[0]
    )


def test_when_all_are_damaged_the_run_says_so(workdir: Path, like):
    for step in (2, 4, 6):
        truncate(workdir / f"checkpoints/{step}/params")
    with pytest.raises(
        InputError, match=r"None of the checkpoints \[2, 4, 6\] in .* can be read.*backup"
    ) as caught:
        Checkpoints(workdir).restore(like)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        restore_params(workdir, shapes_of(tiny_config()))


def test_a_whole_checkpoint_that_cannot_be_read_is_not_set_aside(workdir: Path, like):
    """What a file holds is nonsense, but it is what the manifest says was written: the run stops, all stays."""
    folder = workdir / "checkpoints/6"
    victim = folder / "params/_METADATA"
    victim.write_text("{")
    manifest = json.loads((folder / MANIFEST).read_text())
    name = str(victim.relative_to(folder))
    manifest[name] = [victim.stat().st_size, zlib.crc32(victim.read_bytes())]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert damage(folder) is None
    with pytest.raises(InputError, match="cannot be read, although its files are what was written"):
        Checkpoints(workdir).restore(like)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) == [
        "2",
        "4",
        "6",
    ]


def test_restore_params_skips_damage_and_names_absent_steps(workdir: Path, caplog):
    shapes = shapes_of(tiny_config())
    truncate(workdir / "checkpoints/6/params")
    assert restore_params(workdir, shapes)[1] == 4
    assert "checkpoints/6 is damaged" in caplog.text
    assert restore_params(workdir, shapes, step=2)[1] == 2
    with pytest.raises(InputError, match=r"no checkpoint of step 3; it has \[2, 4, 6\]"):
        restore_params(workdir, shapes, step=3)
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        restore_params(workdir, shapes, step=6)


def test_an_old_checkpoint_half_deleted_by_a_kill_does_no_harm(workdir: Path, like):
    shutil.rmtree(workdir / "checkpoints/2/params")
    (workdir / "checkpoints/2/_CHECKPOINT_METADATA").unlink()
    assert Checkpoints(workdir, keep=3).restore(like).step == 6


# What may not change between starts, as the message must name it: key, old value, new value.
CHANGED = {
    "optim__lr": (1e-2, "optim.lr (0.001 then, 0.01 now)"),
    "optim__name": ("lion", "optim.name ('adamw' then, 'lion' now)"),
    "train__steps": (9, "train.steps (6 then, 9 now)"),
    "train__rows_per_step": (8, "train.rows_per_step (4 then, 8 now)"),
    "data__max_length": (128, "data.max_length (256 then, 128 now)"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_config_that_does_not_fit_is_refused_with_both_values(name: str, workdir: Path):
    value, says = CHANGED[name]
    before = (workdir / "config.json").read_text()
    with pytest.raises(InputError) as caught:
        run(tiny_config(checkpoint__every=2, checkpoint__keep=3, **{name: value}), workdir)
    assert says in str(caught.value)
    assert str(workdir) in str(caught.value)
    assert (workdir / "config.json").read_text() == before
    assert completed_steps(workdir) == [2, 4, 6]


def test_a_finished_run_goes_on_with_more_steps_and_another_rate(workdir: Path, capsys):
    """6 steps become 8, the last two with the new rate; the change is recorded, and taken back is a change again."""
    first = (workdir / "metrics.jsonl").read_text()
    keys = {"checkpoint__every": 2, "checkpoint__keep": 4, "optim__schedule": "constant", "optim__lr": 5e-4}
    changed = tiny_config(train__steps=8, **keys)
    allowed = ("optim.lr", "optim.schedule", "train.steps")
    with pytest.raises(InputError, match="--allow_change=optim.lr,optim.schedule,train.steps to go on"):
        run(changed, workdir)
    assert (workdir / "summary.json").is_file()
    run(changed, workdir, allowed=allowed)
    assert "From step 6 on another config: " in capsys.readouterr().out
    assert completed_steps(workdir) == [2, 4, 6, 8]
    text = (workdir / "metrics.jsonl").read_text()
    assert text.startswith(first)
    rows = [json.loads(line) for line in text.removeprefix(first).splitlines()]
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert rates == {7: pytest.approx(5e-4), 8: pytest.approx(5e-4)}
    (line,) = (workdir / "config_history.jsonl").read_text().splitlines()
    assert json.loads(line)["changes"]["train.steps"] == [6, 8]
    with pytest.raises(InputError, match="has reached step 8, and train.steps is 4 now"):
        run(tiny_config(train__steps=4, **keys), workdir, allowed=("train.steps",))
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 8


def test_several_changed_keys_are_all_named(workdir: Path):
    config = tiny_config(checkpoint__every=2, optim__lr=1e-2)
    config.seed = 7
    config.model.config["hidden_size"] = 64
    with pytest.raises(InputError) as caught:
        run(config, workdir)
    for says in (
        "model.config.hidden_size (48 then, 64 now)",
        "optim.lr (0.001 then, 0.01 now)",
        "seed (0 then, 7 now)",
    ):
        assert says in str(caught.value)


def test_how_a_run_is_carried_out_may_change(workdir: Path, capsys):
    """Mesh, logging, checkpoints, remat and micro-batches: resumed at once, with the new config written."""
    config = tiny_config(
        checkpoint__every=3,
        checkpoint__keep=1,
        log__every=5,
        train__micro_rows=2,
        train__remat="full",
        eval__batch_rows=4,
    )
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 2, 4
    shutil.rmtree(workdir / "checkpoints/6")
    run(config, workdir)
    assert "Resuming from step 4" in capsys.readouterr().out
    assert json.loads((workdir / "config.json").read_text())["mesh"]["tensor"] == 4
    assert json.loads((workdir / "summary.json").read_text())["final_step"] == 6


def test_a_mistake_corrected_before_the_first_checkpoint_is_no_obstacle(tmp_path: Path):
    """The first start fails on a bad value; the second, corrected, must not be refused for having changed it."""
    with pytest.raises(InputError, match="optim.name is 'adamm'"):
        run(tiny_config(optim__name="adamm"), tmp_path)
    run(tiny_config(train__steps=2), tmp_path)


def test_another_model_shape_is_refused(workdir: Path):
    """Even where config.json was made to agree, the arrays on disk decide."""
    config = tiny_config(checkpoint__every=2, checkpoint__keep=3)
    config.model.config.update({**TINY_MODEL, "intermediate_size": 64})
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(
        InputError, match=r"does not fit this config: layers/mlp/down/kernel is \(2, 96, 48\) on disk and"
    ):
        run(config, workdir)
    assert completed_steps(workdir) == [2, 4, 6]


def test_changed_data_is_refused(workdir: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((ROOT / "configs/tiny/chats.jsonl").read_text().splitlines(keepends=True)[:20]))
    config = tiny_config(checkpoint__every=2, checkpoint__keep=3, data__train=str(path))
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.rmtree(workdir / "checkpoints/6")
    with pytest.raises(InputError, match="training data"):
        run(config, workdir)


# Restoring elsewhere.

MESHES = ((2, 2, 2), (1, 1, 1), (1, 4, 2))


@pytest.mark.slow
@pytest.mark.parametrize("saved_on", MESHES[:2], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_checkpoint_moves_between_meshes_and_device_counts(saved_on, optimizer: str, tmp_path: Path):
    """Saved on 8 devices and restored on 1, the other way, and onto other shapes: every leaf bit for bit, in its
    place, and the next step's loss the same."""
    trainer = make_trainer(make_mesh(*saved_on), ema=0.9, optimizer=optimizer)
    state, _ = trainer.step(trainer.state, trainer.put(random_rows(8, 16)))
    writer = Checkpoints(tmp_path)
    writer.save(state, {"rows": 8, "last": {"a": 0.1}}, {})
    writer.close()
    want = jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    _, metrics = trainer.step(state, trainer.put(random_rows(8, 16, seed=1)))
    for shape in MESHES:
        other = make_trainer(make_mesh(*shape), ema=0.9, optimizer=optimizer)
        restored = Checkpoints(tmp_path).restore(
            jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                other.state,
                other.places,
            )
        )
        got = restored.state
        assert restored.meta == {"rows": 8, "last": {"a": 0.1}, "collector": {}}
        plain = dataclasses.replace(got, key=jax.random.key_data(got.key))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(plain), want)
        for path, leaf, place in zip(
            leaf_paths(got.params),
            jax.tree.leaves(got.params),
            jax.tree.leaves(other.places.params),
            strict=True,
        ):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path
        if optimizer == "adafactor" or shape == MESHES[2]:
            continue
        _, again = other.step(got, other.put(random_rows(8, 16, seed=1)))
        assert float(again["train/loss"].sum) == pytest.approx(float(metrics["train/loss"].sum), rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_is_read_by_a_process_with_one(
    processes, workdir: Path, finished: Path
):
    """A process that sees a single CPU device resumes what 8 devices left, and the other way round."""
    shutil.rmtree(workdir / "checkpoints/6")
    overrides = [
        "--config.checkpoint.every=2", "--config.checkpoint.keep=3", "--config.train.steps=6", "--config.eval.every=0",
        "--config.eval.prompts=()", "--config.log.tensorboard=false", "--config.mesh.data=1",
    ]  # fmt: skip
    ended = processes.run(
        "launch.train", "--config=configs/sft/smollm2_135m.py:tiny", f"--workdir={workdir}", *overrides
    )
    assert ended.code == 0, ended.err
    assert "Resuming from step 4" in ended.out
    shapes = shapes_of(tiny_config())
    want, got = restore_params(finished, shapes)[0], restore_params(workdir, shapes)[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    shutil.rmtree(workdir / "checkpoints/6")
    # Written by one device (the final save), now resumed by eight.
    shutil.rmtree(workdir / "checkpoints/4")
    run(tiny_config(checkpoint__every=2, checkpoint__keep=3), workdir)
    assert completed_steps(workdir)[-1] == 6


@pytest.mark.slow
def test_the_average_of_eight_devices_is_exported_by_a_process_with_one(processes, tmp_path: Path):
    run(tiny_config(train__steps=1, optim__ema=0.9), tmp_path / "run")
    ended = processes.run("launch.export", f"--workdir={tmp_path}/run", f"--out={tmp_path}/hf", "--ema")
    assert ended.code == 0, ended.err
    average, _ = restore_params(tmp_path / "run", shapes_of(tiny_config()), ema=True)
    got = load_model(str(tmp_path / "hf")).params
    jax.tree.map(np.testing.assert_array_equal, got, average)


@pytest.mark.slow
def test_frozen_parameters_of_lora_survive_and_their_damage_is_named(tmp_path: Path, caplog):
    """The base model is saved once, beside the checkpoints."""
    config = tiny_config(train__steps=4, checkpoint__every=2)
    config.model.lora.rank = 2
    run(config, tmp_path)
    shapes = shapes_of(config)
    params, step = restore_params(tmp_path, shapes)
    assert step == 4
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    flip_a_byte(tmp_path / "frozen")
    with pytest.raises(
        InputError, match=r"frozen is damaged: the contents of its file .* training command again"
    ):
        restore_params(tmp_path, shapes)
    shutil.rmtree(tmp_path / "checkpoints/4")
    run(config, tmp_path)
    assert "frozen is damaged" in caplog.text
    mended, step = restore_params(tmp_path, shapes)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, mended, params)


# Exit codes and stderr of the real command.


@pytest.mark.slow
def test_the_command_exits_with_2_and_one_line(processes, workdir: Path):
    command = ("launch.train", "--config=configs/sft/smollm2_135m.py:tiny", f"--workdir={workdir}")
    overrides = [
        "--config.checkpoint.every=2", "--config.checkpoint.keep=3", "--config.train.steps=6", "--config.eval.every=0",
        "--config.eval.prompts=()", "--config.log.tensorboard=false", "--config.mesh.data=1",
    ]  # fmt: skip
    ended = processes.run(*command, *overrides, "--config.optim.lr=0.5")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "optim.lr (0.001 then, 0.5 now)" in ended.err
    for step in (2, 4, 6):
        flip_a_byte(workdir / f"checkpoints/{step}/params")
    ended = processes.run(*command, *overrides)
    assert ended.code == 2, ended
    told = ended.err.splitlines()
    assert [line.split(" is damaged")[0] for line in told[:3]] == [
        f"Checkpoint {workdir}/checkpoints/{step}" for step in (6, 4, 2)
    ]
    assert told[3].startswith("error: None of the checkpoints [2, 4, 6]")
    assert len(told) == 4
    ended = processes.run(*command, *overrides)
    assert ended.code == 0, "after saying so, the same command starts from the beginning"


FULL_DISK = """
set -e
mkdir -p "$1/disk"
mount -t tmpfs -o size="$2" tmpfs "$1/disk"
shift 2
"$@" && code=0 || code=$?
cp -r "$DISK" "$COPY"
exit $code
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["100k", "2500k"])
def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(size: str, tmp_path: Path, processes):
    """The workdir is a small tmpfs in a mount namespace of its own; a copy of it is looked at afterwards. 100k are not
    enough for what a run writes before its first step, 2500k hold some checkpoints."""
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"no mount namespaces here: {allowed.stderr.decode().strip()}")
    disk = tmp_path / "disk"
    command = [
        sys.executable, "-m", "launch.train", "--config=configs/sft/smollm2_135m.py:tiny", f"--workdir={disk}/run",
        "--config.train.steps=60", "--config.checkpoint.every=1", "--config.checkpoint.keep=40",
        "--config.eval.every=0", "--config.eval.prompts=()",
    ]  # fmt: skip
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", str(tmp_path), size, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=180,
        check=False,
        env={**processes.environment(), "DISK": f"{disk}/run", "COPY": str(tmp_path / "copy")},
    )
    assert ended.returncode == 2, ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert "full" in line or "No space left on device" in line
    copy = tmp_path / "copy"
    steps = completed_steps(copy)
    if size == "100k":
        assert not steps
        return
    assert steps, "no checkpoint fitted; the disk of this test is too small"
    assert f"step {steps[-1]}" in line
    assert restore_params(copy, shapes_of(tiny_config()))[1] == steps[-1]


def test_layouts_of_a_state_are_those_of_a_trainer():
    """Guards the helper above: `make_trainer` and `task_of` agree on what a state is."""
    state = make_trainer(make_mesh(1, 1, 1), ema=0.5).state
    model = make_model(LLAMA, attention="xla")
    assert jax.tree.structure(state.params) == jax.tree.structure(model.abstract_params())
    assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
