"""Real processes of `python -m MODULE ...`, forked from a server that has imported the libraries (fork_server.py)."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMEOUT = 180.0


@dataclasses.dataclass(frozen=True)
class Ended:
    """Exit code (negative: the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


def environment(*, devices: int = 1, **variables: str) -> dict[str, str]:
    """For a process with so many virtual CPU devices that shares this session's compilation cache."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    if devices > 1:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


class _Server:
    """The fork server of this test process; `start` is safe from any thread."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "tests/fork_server.py"), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment(),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._changed = threading.Condition()
        self._started: list[int] = []
        self._codes: dict[int, int] = {}
        self._starting = threading.Lock()
        self._lines = self._channel.makefile("r", encoding="utf-8")
        assert json.loads(self._lines.readline())["ready"]
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        atexit.register(self.close)

    def _listen(self) -> None:
        for line in self._lines:
            message = json.loads(line)
            with self._changed:
                if "pid" in message:
                    self._codes.pop(message["pid"], None)  # of an earlier child with the same number
                    self._started.append(message["pid"])
                else:
                    self._codes[message["ended"]] = message["code"]
                self._changed.notify_all()

    def start(self, argv: Sequence[str], env: Mapping[str, str], fds: Sequence[int]) -> int:
        job = json.dumps({"argv": list(argv), "env": dict(env)}).encode()
        with self._starting:
            socket.send_fds(self._channel, [job], list(fds))
            with self._changed:
                assert self._changed.wait_for(lambda: self._started, TIMEOUT), "the fork server is gone"
                return self._started.pop()

    def code(self, pid: int, timeout: float | None) -> int | None:
        """The exit code of a child, or None if it still runs after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._codes, timeout)
            return self._codes.get(pid)

    def close(self) -> None:
        self._channel.shutdown(socket.SHUT_RDWR)
        self._process.wait(20)
        self._listener.join()
        self._lines.close()
        self._channel.close()


_server = functools.cache(_Server)


class EntryPoint:
    """A running `python -m argv[0] ...`; what it prints is read as it comes."""

    def __init__(self, *argv: str, env: Mapping[str, str] | None = None, stdin: IO | None = None):
        with contextlib.ExitStack() as theirs:
            given = stdin if stdin is not None else theirs.enter_context(open(os.devnull, "rb"))
            ends = [os.pipe(), os.pipe()]
            for _, write in ends:
                theirs.callback(os.close, write)
            fds = [given.fileno(), *(write for _, write in ends)]
            self.pid = _server().start(argv, environment() if env is None else env, fds)
        self._lines: list[list[str]] = [[], []]
        self._more = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(index, read), daemon=True)
            for index, (read, _) in enumerate(ends)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, index: int, fd: int) -> None:
        with open(fd, encoding="utf-8", newline="") as file:
            for line in file:
                with self._more:
                    self._lines[index].append(line)
                    self._more.notify_all()
        with self._more:
            self._more.notify_all()

    def line(self, timeout: float = TIMEOUT) -> str:
        """The first line of its stdout, or "" if it ends without one."""
        with self._more:
            self._more.wait_for(lambda: self._lines[0] or not self._readers[0].is_alive(), timeout)
            return self._lines[0][0] if self._lines[0] else ""

    def code(self) -> int | None:
        """The exit code, or None while it runs."""
        return _server().code(self.pid, 0)

    def send_signal(self, signum: int) -> None:
        """Sends a signal, if it still runs."""
        if self.code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """Waits for its end; after `timeout` seconds it is killed, and the wait is a failure."""
        code = _server().code(self.pid, timeout)
        if code is None:
            self.send_signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s: {self._lines}")
        for reader in self._readers:
            reader.join(timeout)
        return Ended(code, *("".join(lines) for lines in self._lines))


def run(*argv: str, stdin: str | bytes = "", env: Mapping[str, str] | None = None) -> Ended:
    """Runs `python -m argv[0] ...` to its end, with `stdin` to read."""
    with tempfile.TemporaryFile() as file:
        file.write(stdin.encode() if isinstance(stdin, str) else stdin)
        file.seek(0)
        return EntryPoint(*argv, env=env, stdin=file).wait()


def run_together(commands: Sequence[Sequence[str]], *, env: Mapping[str, str] | None = None) -> list[Ended]:
    """Starts `python -m ...` for every command at once and waits for all; what is left is killed."""
    running = [EntryPoint(*command, env=env) for command in commands]
    try:
        return [process.wait() for process in running]
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
