"""Starts entry points as processes of their own, quickly: the libraries are imported once, every start is a fork.

Reads one JSON object a line from stdin, {"argv": [...], "out": PATH, "err": PATH}, runs `python -m argv[0]` with
the rest in a child (JAX's backend is not up in the parent, so only imported code is shared), and
writes {"pid": n} at once and {"pid": n, "code": c} when the child is gone (negative: the signal that killed it).
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading

import posttrain_jax.algorithms.sft
import posttrain_jax.train_loop  # noqa: F401

LOCK = threading.Lock()


def tell(message: dict) -> None:
    with LOCK:
        print(json.dumps(message), flush=True)


def run_child(job: dict) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
    os.close(0)
    module, *arguments = job["argv"]
    sys.argv = [f"{module.replace('.', '/')}.py", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    tell({"ready": True, "threads": threading.active_count()})
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                run_child(job)
            except SystemExit as error:
                code = error.code
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 0 if code is None else 1)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        tell({"pid": pid})
        _, status = os.waitpid(pid, 0)
        tell({"pid": pid, "code": os.waitstatus_to_exitcode(status)})


main()
