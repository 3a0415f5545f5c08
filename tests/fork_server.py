"""Starts entry points as processes of their own, quickly: the libraries are imported once, every start is a fork.

`python fork_server.py FD` reads jobs from the socket FD: one JSON object, {"argv": [...], "env": {...}}, together with
the three file descriptors that become the child's stdin, stdout and stderr. The child runs `python -m argv[0]` with
the rest. The answers are JSON lines: {"pid": n} at once, {"ended": n, "code": c} when a child is gone (negative: the
signal that killed it). JAX's backend is not up in this process, so a child shares imported code only.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback

# What entry points import, and what the libraries below them import only when they are used. An extra may be missing.
MODULES = (
    "posttrain_jax.algorithms.dpo",
    "posttrain_jax.algorithms.kto",
    "posttrain_jax.algorithms.ppo",
    "posttrain_jax.algorithms.reward_model",
    "posttrain_jax.algorithms.rloo",
    "posttrain_jax.algorithms.sft",
    "posttrain_jax.evaluate.held_out",
    "posttrain_jax.evaluate.ifeval",
    "posttrain_jax.evaluate.kl_to_reference",
    "posttrain_jax.evaluate.math_problems",
    "posttrain_jax.evaluate.multiple_choice",
    "posttrain_jax.evaluate.reward_report",
    "posttrain_jax.evaluate.win_rate",
    "posttrain_jax.models.io.export",
    "posttrain_jax.models.io.load",
    "posttrain_jax.serving.app",
    "posttrain_jax.run.loop",
    "launch.config",
    "launch.entry",
    "jax.experimental.multihost_utils",
    "matplotlib.pyplot",
    "openai",
    "tensorboardX",
    "transformers.activations",
    "transformers.models.gemma3.configuration_gemma3",
    "transformers.models.llama.configuration_llama",
    "transformers.tokenization_utils_tokenizers",
    "uvicorn.protocols.http.h11_impl",
)


def run(job: dict, fds: list[int]) -> None:
    """The child's whole life."""
    for stream, fd in enumerate(fds):
        os.dup2(fd, stream)
    os.environ.clear()
    os.environ.update(job["env"])
    module, *arguments = job["argv"]
    sys.argv = [f"{module.replace('.', '/')}.py", *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if name.startswith(("posttrain_jax", "launch")) and (error.name or "").startswith(
                "posttrain_jax"
            ):
                raise
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(ended, selectors.EVENT_READ)
    children: set[int] = set()
    tell(channel, {"ready": True})
    while True:
        for key, _ in selector.select():
            if key.fileobj is channel:
                data, fds, _, _ = socket.recv_fds(channel, 1 << 20, 3)
                if not data:  # the tests are over, or were killed
                    for child in children:
                        os.kill(child, signal.SIGKILL)
                    return
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    channel.close()
                    run(json.loads(data), fds)
                for fd in fds:
                    os.close(fd)
                children.add(pid)
                tell(channel, {"pid": pid})
            else:
                os.read(ended, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            children.discard(pid)
            tell(channel, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def tell(channel: socket.socket, message: dict) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


main()
