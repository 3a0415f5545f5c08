"""A workdir's checkpoints and their manifests, and its lock: one run at a time, and none after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain_jax.core.errors import InputError, file_error
from posttrain_jax.core.workdir import ITEMS, LOCK, MANIFEST, completed_steps, damage, locked, write_manifest

HOLD = """
import pathlib, sys, time
from posttrain_jax.core.workdir import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_workdir_in_use_is_refused_by_host_and_process(tmp_path: Path):
    with locked(tmp_path):
        with pytest.raises(
            InputError, match=rf"in use by process {os.getpid()} on \S+, since 2.*another --workdir"
        ):
            with locked(tmp_path):
                pass
        assert (tmp_path / LOCK).read_text().count("\n") == 1
    with locked(tmp_path):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on "):
            with locked(tmp_path):
                pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_only_numbers_as_they_are_written_here_are_steps(tmp_path: Path):
    for name in ("7", "10", "0", "007", "\u00b2", "\u0663", "7.damaged", "x", "8.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/9").write_text("a file")
    assert completed_steps(tmp_path) == [0, 7, 10]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    for item in ITEMS:
        (tmp_path / item).mkdir()
        (tmp_path / item / "data").write_bytes(item.encode())
    write_manifest(tmp_path)
    assert damage(tmp_path) is None
    return tmp_path


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ({}, "does not name its file meta/data"),
        ({"params/data": [6, 1]}, "the contents of its file params/data have changed"),
        ([], "is not what was written"),
        ({"params/data": 5}, "is not what was written"),
        ({"\0": [1, 2]}, "is gone"),
    ],
)
def test_an_odd_manifest(step: Path, manifest: object, says: str):
    (step / MANIFEST).write_text(json.dumps(manifest))
    assert says in damage(step)


def test_a_manifest_that_nests_deep_or_is_a_folder(step: Path):
    (step / MANIFEST).write_text("[" * 100_000)
    assert "is not what was written" in damage(step)
    (step / MANIFEST).unlink()
    (step / MANIFEST).mkdir()
    assert "is gone" in damage(step)


def test_a_file_error_is_found_in_an_exception_that_is_its_own_cause():
    full = OSError(28, "No space left on device", "a/file")
    failed = ValueError("a save failed")
    failed.__cause__ = full
    assert file_error(failed) is full
    full.__cause__ = failed
    failed.__cause__ = None
    assert file_error(failed) is None
    looped = OSError(104, "Connection reset by peer")
    looped.__cause__ = looped
    assert file_error(looped) is None
    other = RuntimeError("UNAVAILABLE: writing d/0: Read-only file system [os_error_code='30']")
    assert file_error(other).strerror == "Read-only file system"
