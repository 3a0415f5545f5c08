"""Starts real processes of `launch.train`, kills them when asked, and tells how they ended."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 180.0


@dataclasses.dataclass(frozen=True)
class Ended:
    """Exit code (negative: the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


def environment(cache: pathlib.Path, devices: int) -> dict[str, str]:
    """For a process with so many virtual devices and the caches of this test session."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    if devices > 1:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": str(ROOT),
        "POSTTRAIN_CACHE": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }


class Processes:
    """Processes of `python -m MODULE ...`, one after another, forked from a server that has imported the libraries."""

    def __init__(self, folder: pathlib.Path):
        self.cache = folder / "cache"
        self._folder = folder
        self._count = 0
        self._messages: queue.Queue[dict] = queue.Queue()
        self._server = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "tests/contracts/fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(self.cache, 1),
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._pid = 0
        assert self._messages.get(timeout=TIMEOUT)["ready"]

    def _listen(self) -> None:
        for line in self._server.stdout:
            self._messages.put(json.loads(line))

    def start(self, *argv: str) -> None:
        """Starts `python -m argv[0] ...` with one CPU device; one at a time."""
        self._count += 1
        self._paths = [self._folder / f"{self._count}.{name}" for name in ("out", "err")]
        job = {"argv": argv, "out": str(self._paths[0]), "err": str(self._paths[1])}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        self._pid = self._messages.get(timeout=TIMEOUT)["pid"]

    def wait(self) -> Ended:
        """Waits for the end of what was started."""
        message = self._messages.get(timeout=TIMEOUT)
        return Ended(message["code"], *(path.read_text() for path in self._paths))

    def run(self, *argv: str) -> Ended:
        self.start(*argv)
        return self.wait()

    def run_until(self, reached: Callable[[], bool], signum: int, *argv: str) -> Ended:
        """Starts, sends the signal in the moment that `reached()`, and waits for the end."""
        self.start(*argv)
        deadline = time.monotonic() + TIMEOUT
        while not reached():
            assert time.monotonic() < deadline, "the moment never came"
            assert self._messages.empty(), f"it ended before: {self.wait()}"
            time.sleep(0.0003)
        os.kill(self._pid, signum)
        return self.wait()

    def close(self) -> None:
        self._server.stdin.close()
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            os.kill(self._pid, signal.SIGKILL)
            self._server.kill()
        self._listener.join()
        self._server.stdout.close()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """One `Processes` for the whole session."""
    server = Processes(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@dataclasses.dataclass(frozen=True)
class Together:
    """Starts several processes that work together, each a fresh interpreter."""

    cache: pathlib.Path

    def run(
        self, commands: Sequence[Sequence[str]], *, devices: int = 1, extra: Mapping[str, str] = {}
    ) -> list[Ended]:
        """Runs `python -m ...` for every command at once and waits for all."""
        running = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**environment(self.cache, devices), **extra},
            )
            for command in commands
        ]
        ended = []
        try:
            for process in running:
                out, err = process.communicate(timeout=TIMEOUT)
                ended.append(Ended(process.returncode, out, err))
        finally:
            for process in running:
                process.kill()
        return ended


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(tmp_path_factory.mktemp("together"))
