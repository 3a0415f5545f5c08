"""`python -m launch.train` with every kind of bad input: exit code 2 and one line. Real processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from contracts.conftest import Processes
from entry_points import ROOT

from launch.config import load_file
from launch.entry import set_up_jax, tolerant_stream
from posttrain_jax.core.errors import InputError

TINY = "--config=configs/sft/smollm2_135m.py:tiny"


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    return Processes(tmp_path_factory.mktemp("launch"))


def refused(processes: Processes, *arguments: str) -> str:
    """The one line that the command prints on stderr before it ends with 2."""
    ended = processes.run("launch.train", *arguments)
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    return lines[0]


# Wrong before anything is imported or made: the arguments, and what the line must hold.
FLAGS = {
    "unknown_key": ([TINY, "--config.optim.lrate=1"], ["'optim.lrate'", "'optim.lr'"]),
    "unknown_section": ([TINY, "--config.optimizer.lr=1"], ["'optimizer.lr'", "'optim.lr'"]),
    "unknown_key_apart": ([TINY, "--config.optim.lrate", "1"], ["'optim.lrate'", "'optim.lr'"]),
    "float_is_text": ([TINY, "--config.optim.lr=fast"], ["optim.lr is 'fast'", "a number"]),
    "int_is_float": ([TINY, "--config.train.steps=1.5"], ["train.steps is '1.5'", "a whole number"]),
    "int_apart": ([TINY, "--config.train.steps", "many"], ["train.steps is 'many'", "a whole number"]),
    "bool_is_text": ([TINY, "--config.data.pack=maybe"], ["data.pack is 'maybe'", "true or false"]),
    "value_missing": ([TINY, "--config.optim.lr"], ["optim.lr", "needs a value"]),
    "config_missing": (
        ["--config=configs/sft/smollm.py"],
        ["configs/sft/smollm.py", "configs/sft/smollm2_135m.py"],
    ),
    "config_apart_missing": (["--config", "nowhere.py"], ["no config file nowhere.py"]),
    "variant": (["--config=configs/sft/smollm2_135m.py:huge"], ["'huge'", "tiny"]),
    "no_coordinator": ([TINY, "--processes=2", "--process=1"], ["--process=1 need --coordinator=HOST:PORT"]),
    "process_beyond": (
        [TINY, "--coordinator=127.0.0.1:1234", "--processes=2", "--process=5"],
        ["--process=5 of --processes=2", "counted from 0"],
    ),
    "no_processes": (
        [TINY, "--coordinator=127.0.0.1:1234", "--processes=0"],
        ["--process=0 of --processes=0"],
    ),
    "no_address": (
        [TINY, "--coordinator=garbage", "--processes=2"],
        ["--coordinator=garbage is not HOST:PORT"],
    ),
    "no_port": ([TINY, "--coordinator=host:99999", "--processes=2"], ["is not HOST:PORT"]),
    "auto_and_more": ([TINY, "--coordinator=auto", "--processes=2"], ["leave out --processes=2"]),
    "not_a_flag": (
        [TINY, "optim.lr=1"],
        ["'optim.lr=1' is not a flag", "an example: python -m launch.train"],
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags(processes, name: str, tmp_path: Path):
    arguments, parts = FLAGS[name]
    line = refused(processes, *arguments, f"--workdir={tmp_path}/run")
    for part in parts:
        assert part in line, line
    assert not (tmp_path / "run").exists()


# Wrong values of keys that exist.
VALUES = {
    "optimizer": (
        "optim.name=adam",
        ["optim.name is 'adam'", "adamw, adafactor, lion, rmsprop, sgd, adam_tf"],
    ),
    "schedule": ("optim.schedule=cos", ["optim.schedule is 'cos'", "constant, linear, cosine, wsd"]),
    "remat": ("train.remat=some", ["train.remat is 'some'", "none, elementwise, mlp, full"]),
    "dtype": ("model.dtype=fp8", ["model.dtype is 'fp8'", "float32, bfloat16"]),
    "attention": ("model.attention=flash", ["model.attention is 'flash'"]),
    "algorithm": ("algorithm=stf", ["algorithm is 'stf'", "sft"]),
    "truncate": ("data.truncate=left", ["data.truncate", "'left'", "right"]),
    "on_bad_row": ("data.on_bad_row=ignore", ["data.on_bad_row", "'ignore'", "skip"]),
    "train_on": ("data.train_on=all", ["data.train_on", "'all'", "all_turns"]),
    "data_missing": ("data.train=rows/none.jsonl", ["rows/none.jsonl"]),
    "mixture": (
        'data.train=[["a.jsonl"]]',
        ["data.train is [['a.jsonl']]", "a list of [text, number]"],
    ),
    "split": ("data.eval=split:0", ["data.eval", "split:"]),
    "model_missing": ("model.init=models/none", ["models/none"]),
    "model_empty": ("model.init=", ["model.init is not set"]),
    "data_empty": ("data.train=", ["data.train is not set"]),
    "tokenizer_missing": ("model.tokenizer=models/none", ["models/none"]),
    "rows": ("train.micro_rows=3", ["train.micro_rows=3", "train.rows_per_step=4", "it could be 1, 2, 4"]),
    "epochs_too": ("train.epochs=1.0 train.steps=3", ["exactly one of train.steps and train.epochs"]),
    "no_steps": ("train.steps=0", ["exactly one of train.steps and train.epochs"]),
    "negative_steps": ("train.steps=-1", ["train.steps is -1", "0 or more"]),
    "mesh": ("mesh.tensor=3", ["mesh.data", "1 device"]),
    "lr_negative": ("optim.lr=-1.0", ["optim.lr is -1"]),
    "lr_nan": ("optim.lr=nan", ["optim.lr is nan"]),
    "ema": ("optim.ema=1.0", ["optim.ema is 1.0"]),
    "log_every": ("log.every=0", ["log.every is 0", "at least 1"]),
    "eval_every": ("eval.every=-1", ["eval.every is -1", "0 or more"]),
    "max_length": ("data.max_length=0", ["data.max_length is 0", "at least 2"]),
    "profile": ("log.profile=ten", ["log.profile is 'ten'", '"10:12"']),
    "seed": ("seed=-1", ["seed is -1"]),
    "lora_target": ("model.lora.rank=2 model.lora.targets=('qq',)", ["model.lora.targets", "qq"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_bad_values(processes, name: str, tmp_path: Path):
    overrides, parts = VALUES[name]
    line = refused(
        processes, TINY, f"--workdir={tmp_path}/run", *(f"--config.{text}" for text in overrides.split(" "))
    )
    for part in parts:
        assert part in line, line


DPO = "--config=configs/dpo/smollm2_135m.py:tiny"
KTO = "--config=configs/dpo/smollm2_135m_kto.py:tiny"
REWARD = "--config=configs/reward_model/smollm2_135m.py:tiny"
LABELS, PAIRS = "data.train=configs/tiny/labels.jsonl", "data.train=configs/tiny/pairs.jsonl"

# Preferences: what a value or a file of another kind gets.
PREFERENCES = {
    "loss": (DPO, "dpo.loss=dop", ["dpo.loss is 'dop'", "simpo"]),
    "needed": (DPO, "dpo.loss=orpo", ["dpo.loss=orpo needs dpo.alpha"]),
    "unused": (DPO, "dpo.alpha=0.1", ["dpo.loss=dpo does not look at it", "rdpo, dpop"]),
    "no_soft_labels": (REWARD, "reward.loss=soft_label", ["needs probabilities below 1"]),
    "no_smoothing": (REWARD, "reward.loss=smoothed_label", ["reward.label_smoothing=0 is bradley_terry"]),
    "unused_smoothing": (
        REWARD,
        "reward.label_smoothing=0.1",
        ["reward.loss=bradley_terry does not look at it"],
    ),
    "reference": (DPO, "dpo.reference=frozen", ["dpo.reference is 'frozen'", "cached, memory"]),
    "no_reference": (DPO, "dpo.reference=none", ["dpo.loss=dpo", "slic, simpo, orpo, cpo"]),
    "no_adapter": (DPO, "dpo.reference=adapter", ["model.lora.rank is 0"]),
    "beta": (DPO, "dpo.beta=0.0", ["dpo.beta is 0"]),
    "smoothing": (DPO, "dpo.label_smoothing=0.5", ["dpo.label_smoothing is 0.5", "less than 0.5"]),
    "exo": (DPO, "dpo.loss=exo", ["dpo.label_smoothing", "dpo.loss=exo needs dpo.label_smoothing"]),
    "share": (DPO, "data.share_prompt=maybe", ["data.share_prompt is 'maybe'", "auto, yes, no"]),
    "row_length": (DPO, "data.row_length=64", ["configs/tiny/pairs.jsonl:", "data.row_length=64"]),
    "labels_for_dpo": (DPO, LABELS, ["configs/tiny/labels.jsonl", "no comparison", "algorithm=kto"]),
    "chats_for_dpo": (
        DPO,
        "data.train=configs/tiny/chats.jsonl",
        ["chats.jsonl, line 1", "a preference needs"],
    ),
    "pairs_for_kto": (KTO, PAIRS, ["configs/tiny/pairs.jsonl", "without a label"]),
    "kto_beta": (KTO, "kto.beta=-1.0", ["kto.beta is -1"]),
    "labels_for_reward": (REWARD, LABELS, ["configs/tiny/labels.jsonl", "no comparison", "regression"]),
    "pairs_for_ratings": (REWARD, "reward.loss=regression", ["no rating", "reward.loss=regression"]),
    "reward_loss": (REWARD, "reward.loss=bt", ["reward.loss is 'bt'", "bradley_terry"]),
    "normalize": (REWARD, "reward.normalize=mean", ["reward.normalize is 'mean'", "demonstrations"]),
    "members": (REWARD, "reward.members=0", ["reward.members is 0"]),
    "head": (REWARD, "reward.head_init=ones", ["'ones'", "normal, zeros"]),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_bad_preferences(processes, name: str, tmp_path: Path):
    config, override, parts = PREFERENCES[name]
    line = refused(processes, config, f"--workdir={tmp_path}/run", f"--config.{override}")
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("def get_config():\n    return missing", "NameError: name 'missing' is not defined"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "has no attribute 'get_config'"),
    ],
)
def test_a_config_file_that_fails(code: str, words: str, tmp_path: Path):
    (tmp_path / "config.py").write_text(code)
    with pytest.raises(InputError, match=words) as caught:
        load_file(str(tmp_path / "config.py"))
    assert f"The config {tmp_path}/config.py fails: " in str(caught.value)


def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="The cache .*/file/compiled cannot be made .* set POSTTRAIN_CACHE"):
        set_up_jax()


@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        ("train", "--workdir=", "--workdir is empty; give a folder"),
        ("train", "--workdir=gs://bucket/run", "--workdir=gs://bucket/run is an address"),
        ("train", "--workdir=s3:/bucket/run", "mount the bucket"),
        ("export", "--out= ", "--out is empty"),
        ("generate", "--out=", "--out is empty"),
        ("evaluate", "--out=gs://bucket/x", "--out=gs://bucket/x is an address"),
        ("compare", "--out=", "--out is empty"),
        ("win_rate", "--out=hdfs://x", "is an address"),
        ("reward_report", "--out=", "--out is empty"),
        ("quickstart", "--dir=", "--dir is empty"),
    ],
)
def test_a_folder_without_a_name_or_on_another_machine(processes, command: str, given: str, says: str):
    ended = processes.run(f"launch.{command}", given)
    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and says in line


@pytest.mark.parametrize(("coordinator", "process"), [("127.0.0.1:1", "1"), ("auto", None)])
def test_processes_that_do_not_meet(processes, coordinator: str, process: str | None, tmp_path: Path):
    """It says that it waits, for how long, and gives up in time; "auto" outside a cluster at once."""
    several = ["--processes=2", f"--process={process}", "--connect_seconds=1"] if process else []
    ended = processes.run(
        "launch.train", TINY, f"--workdir={tmp_path}/run", f"--coordinator={coordinator}", *several
    )
    assert ended.code == 2, ended
    waits, line = ended.err.splitlines()
    assert "waits for the others, for up to" in waits
    assert line.startswith("error: ")
    assert ("did not meet the others" if process else "--coordinator=auto found no cluster") in line
    assert not (tmp_path / "run").exists()


def test_what_is_printed_outlives_its_reader(tmp_path: Path):
    """`| head` and a closed terminal: what nobody reads is dropped, and the rest goes on."""
    reader, writer = os.pipe()
    out = tolerant_stream(writer, None)
    print("first", file=out, flush=True)
    assert os.read(reader, 100) == b"first\n"
    os.close(reader)
    for _ in range(3):
        print("lost" * 5000, file=out, flush=True)
    with open("/dev/full", "wb") as full:
        print("lost", file=tolerant_stream(full.fileno(), None), flush=True)
    os.close(writer)
    print("lost", file=out, flush=True)


def test_a_workdir_that_cannot_be_made(processes, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file/run"):
        line = refused(processes, TINY, f"--workdir={workdir}")
        assert f"The workdir {workdir} cannot be made" in line


@pytest.mark.parametrize("name", ["config.json", "summary.json", ".lock", "model"])
def test_a_folder_where_a_file_is_expected_or_the_other_way(processes, name: str, tmp_path: Path):
    if name == "model":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    assert f"{tmp_path}/{name}" in refused(processes, TINY, f"--workdir={tmp_path}")


def test_a_bad_row_is_named_with_file_and_line(processes, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    good = (ROOT / "configs/tiny/chats.jsonl").read_text().splitlines()
    rows.write_text("\n".join([*good[:9], '{"messages": [{"role": "user"}]}', *good[9:]]))
    line = refused(processes, TINY, f"--config.data.train={rows}", f"--workdir={tmp_path}/run")
    assert f"{rows}, line 10" in line


def test_missing_flags_and_help(processes, tmp_path: Path):
    assert "--config and --workdir are needed; an example:" in refused(processes, TINY)
    assert "--config and --workdir are needed; an example:" in refused(processes, f"--workdir={tmp_path}")
    ended = processes.run("launch.train", "--help")
    assert ended.code in (0, 1)
    assert "Example:\n  python -m launch.train --config=configs/sft/smollm2_135m.py" in ended.out + ended.err
    assert "--workdir" in ended.out + ended.err


def test_an_unknown_flag_is_named(processes, tmp_path: Path):
    ended = processes.run("launch.train", TINY, f"--workdir={tmp_path}/run", "--workdri=x")
    assert ended.code == 2
    assert "workdri" in ended.err.splitlines()[0]
    assert "example: python -m launch.train" in ended.err


def test_overrides_reach_the_run(processes, tmp_path: Path):
    """Also written apart from their flag; and what was done is what config.json says."""
    more = tmp_path / "more.jsonl"
    more.write_text((ROOT / "configs/tiny/chats.jsonl").read_text())
    ended = processes.run(
        "launch.train", "--config", "configs/sft/smollm2_135m.py:tiny", "--workdir", str(tmp_path / "run"),
        "--config.train.steps", "1", "--config.optim.lr=5e-4", "--noconfig.data.pack", "--config.eval.prompts=('Hi',)",
        "--config.data.train", json.dumps([["configs/tiny/chats.jsonl", 3], [str(more), 1]]),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert "configs/tiny/chats.jsonl: " in ended.out and f"{more}: " in ended.out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["train"]["steps"], config["optim"]["lr"], config["data"]["pack"]) == (1, 5e-4, False)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [(0, "Hi"), (1, "Hi")]


@pytest.mark.slow
def test_a_reward_function_that_fails_at_every_answer_ends_the_run(processes, tmp_path):
    """Before the first step: the data have no column "solution"."""
    ended = processes.run(
        "launch.train",
        "--config=configs/ppo/smollm2_sentiment.py:tiny",
        "--config.score.functions=('tests.rollouts.letter_lengths:wrong_column',)",
        f"--workdir={tmp_path}",
    )
    assert ended.code == 2, ended
    error = ended.err.splitlines()[-1]
    assert error.startswith(
        "error: The reward function tests.rollouts.letter_lengths:wrong_column failed at all "
    )
    assert "KeyError: 'solution' (" in error and "letter_lengths.py:" in error
    assert "Traceback" not in ended.err and not (tmp_path / "summary.json").exists()
