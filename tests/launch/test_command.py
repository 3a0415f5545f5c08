"""The command `posttrain-jax`: it lists the entry points, runs each of them, and works installed, from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from entry_points import ROOT, environment, run

from launch.__main__ import commands

PACKAGED = ("posttrain_jax/", "launch/", "configs/", "setup.py", "pyproject.toml", "README", "LICENSE")


def test_the_entry_points_are_listed_with_a_sentence_each():
    known = commands()
    assert {
        "train",
        "generate",
        "chat",
        "serve",
        "export",
        "evaluate",
        "fetch",
        "plot",
        "quickstart",
    } <= known.keys()
    assert not {"config", "entry", "processes", "stderr_filter", "__main__"} & known.keys()
    assert all(text and "\n" not in text for text in known.values())
    ended = run("launch", "--help")
    assert ended.code == 0 and ended.err == ""
    assert [line.split()[0] for line in ended.out.splitlines()[2:]] == list(known)
    assert run("launch").out == ended.out


def test_an_unknown_command_is_named():
    ended = run("launch", "tarin")
    assert ended.code == 2
    assert ended.err == (
        "error: posttrain-jax has no command 'tarin'; the nearest is 'train', and posttrain-jax --help lists all.\n"
    )


def test_a_command_gets_its_flags(tmp_path: Path):
    ended = run(
        "launch",
        "train",
        "--config=sft/smollm2_135m.py:tiny",
        f"--workdir={tmp_path}",
        "--config.optim.lrr=1",
    )
    assert ended.code == 2
    assert ended.err.startswith("error: There is no config key 'optim.lrr'")


@pytest.mark.slow
@pytest.mark.alone
def test_the_installed_package_works_from_another_folder(tmp_path: Path):
    """Installed by pip into a folder of its own, from a copy of the tracked files: a run with a config by its short
    name, tiny data and a reward function of the package, and a template of configs/."""
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if name.startswith(
            ("posttrain_jax/", "launch/", "configs/", "setup.py", "pyproject.toml", "README", "LICENSE")
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*command, f"--target={site}", str(source)], check=True, capture_output=True)
    shutil.rmtree(source)
    env = {**environment(), "PYTHONPATH": str(site), "POSTTRAIN_CACHE": str(tmp_path / "cache")}

    def installed(*argv: str) -> str:
        ended = subprocess.run(
            [sys.executable, str(site / "bin/posttrain-jax"), *argv],
            cwd=elsewhere,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    once = ("--config.train.steps=1", "--config.eval.every=0", "--config.checkpoint.every=0")
    installed("train", "--config=ppo/letters.py:tiny", "--workdir=ppo", *once)
    assert (
        "configs/tiny/prompts.jsonl"
        in json.loads((elsewhere / "ppo/config.json").read_text())["data"]["train"]
    )
    template = "--config.data.chat_template=configs/templates/tulu.jinja"
    installed("train", "--config=configs/sft/smollm2_135m.py:tiny", "--workdir=sft", template, *once)
    assert json.loads((elsewhere / "sft/summary.json").read_text())["status"] == "complete"
    assert installed("plot", "sft", "ppo") == "curves.png\n"
    assert sorted(os.listdir(elsewhere)) == ["curves.png", "ppo", "sft"]
    listing = {path.name for path in site.iterdir()}
    assert not listing & {"tests", "experiments"}
