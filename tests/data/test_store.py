"""A folder of tokenized sequences comes back as it was written, or not at all."""

from __future__ import annotations

import json
import logging
import pathlib

import numpy as np
import pytest

from posttrain_jax.data.store import StoreWriter, publish, read_store


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    with publish(tmp_path / "entry") as scratch:
        with StoreWriter(scratch) as writer:
            writer.append([np.arange(5)], [np.ones(5, bool)], [0], [1])
        (scratch / "meta.json").write_text(json.dumps({"files": ["a.jsonl"], "report": {"rows": 1}}))
        (scratch / "groups.npz").write_bytes(b"what else is kept beside them")
    return tmp_path / "entry"


def edit(path: pathlib.Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "token": (lambda folder: edit(folder / "tokens.npy", -4), "tokens.npy has changed"),
    "mask": (lambda folder: edit(folder / "loss_mask.npy"), "loss_mask.npy has changed"),
    "report": (
        lambda folder: (folder / "meta.json").write_text('{"files": [], "report": {"rows": 2}}'),
        "meta.json has changed",
    ),
    "beside": (lambda folder: edit(folder / "groups.npz"), "groups.npz has changed"),
    "file_gone": (lambda folder: (folder / "groups.npz").unlink(), "other files"),
    "sums_gone": (lambda folder: (folder / "sha256.json").unlink(), "sha256.json: "),
    "sums_odd": (lambda folder: (folder / "sha256.json").write_text("[" * 100_000), "sha256.json: "),
    "sums_empty": (lambda folder: (folder / "sha256.json").write_text("[]"), "other files"),
}


def test_what_was_written_comes_back(folder: pathlib.Path, caplog: pytest.LogCaptureFixture):
    store = read_store(folder)
    assert store.tokens.tolist() == [0, 1, 2, 3, 4]
    assert read_store(folder.with_name("absent")) is None
    assert not caplog.records


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_changed_does_not_and_is_named(
    folder: pathlib.Path, name: str, caplog: pytest.LogCaptureFixture
):
    do_damage, says = DAMAGES[name]
    do_damage(folder)
    caplog.set_level(logging.WARNING)
    assert read_store(folder) is None
    assert f"The cache {folder} is not as it was written ({says}" in caplog.text
