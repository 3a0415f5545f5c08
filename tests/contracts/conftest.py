"""Starts real processes of `launch.train`, kills them when asked, and tells how they ended."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable

import pytest
from entry_points import TIMEOUT, Ended, EntryPoint, environment


class Processes:
    """Processes of `python -m MODULE ...`, one after another, with a cache of their own."""

    def __init__(self, folder: pathlib.Path):
        self.cache = folder / "cache"
        self._process: EntryPoint

    def environment(self, *, devices: int = 1) -> dict[str, str]:
        return environment(devices=devices, POSTTRAIN_CACHE=str(self.cache))

    def start(self, *argv: str, devices: int = 1) -> EntryPoint:
        """Starts `python -m argv[0] ...`."""
        return EntryPoint(*argv, env=self.environment(devices=devices))

    def run(self, *argv: str) -> Ended:
        return self.start(*argv).wait()

    def run_until(self, reached: Callable[[], bool], signum: int, *argv: str) -> Ended:
        """Starts, sends the signal in the moment that `reached()`, and waits for the end."""
        process = self.start(*argv)
        deadline = time.monotonic() + TIMEOUT
        while not reached():
            assert time.monotonic() < deadline, "the moment never came"
            assert process.code() is None, f"it ended before: {process.wait()}"
            time.sleep(0.0003)
        os.kill(process.pid, signum)
        return process.wait()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    """One `Processes` for the whole session."""
    return Processes(tmp_path_factory.mktemp("processes"))
