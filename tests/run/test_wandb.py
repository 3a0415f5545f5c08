"""W&B, where its package is there (extra `wandb`): what is logged arrives, and what it refuses is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.run.metrics import MetricsWriter

wandb = pytest.importorskip("wandb", reason="the package wandb is not installed (extra wandb)")


@pytest.fixture(autouse=True)
def _forget_settings():
    """W&B reads the environment once in a process."""
    yield
    wandb.teardown()


def writer(workdir: Path) -> MetricsWriter:
    return MetricsWriter(workdir, last_kept=-1, tensorboard=False, wandb_project="tests", config={"seed": 7})


def test_what_is_logged_lies_in_the_workdir(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = writer(tmp_path)
    metrics.write(1, {"train/loss": 2.625})
    metrics.write(2, {"train/loss": 2.375})
    metrics.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = file.read_bytes()
    for part in (b"train/loss", b"2.625", b"2.375", b"seed"):
        assert part in written, part


def test_without_a_key_it_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(
        InputError, match="log.wandb_project is 'tests', and W&B says: .*WANDB_MODE=offline"
    ) as caught:
        writer(tmp_path / "run")
    assert "\n" not in str(caught.value)
