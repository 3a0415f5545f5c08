"""Several processes as one run: how they find each other, and how all of them end when one does.

When the coordinator is gone, JAX aborts a process from C++ with 60 lines on standard error; an error in a collective
gives a traceback of the same length. `launch/stderr_filter.py` and `exits_with_its_peers` make one sentence of both.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from launch import entry
from launch.stderr_filter import PEER_ENDED
from posttrain_jax.core.errors import InputError

_PEER_ERROR = re.compile(
    r"gloo|nccl|coordination|heartbeat|barrier|by peer|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE
)
_GRACE_SECONDS = 3.0  # process 0 waits so long before it exits, so that the others can still print


def check(coordinator: str, processes: int, process: int) -> None:
    """Checks the flags of several processes.

    Raises:
      InputError: they do not fit together; says which, and how to write them.
    """
    if not coordinator:
        if (processes, process) != (1, 0):
            raise InputError(
                f"--processes={processes} and --process={process} need --coordinator=HOST:PORT: without it "
                "each process would train alone in the same workdir."
            )
        return
    if coordinator == "auto":
        if (processes, process) != (1, 0):
            raise InputError(
                f"--coordinator=auto finds the number of processes itself; leave out --processes={processes} and "
                f"--process={process}, or give --coordinator=HOST:PORT."
            )
        return
    address = re.fullmatch(r"([\w.-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", coordinator, re.ASCII)
    if not address or not 0 < int(address[2]) < 2**16:
        raise InputError(
            f"--coordinator={coordinator} is not HOST:PORT of process 0 (such as 10.0.0.1:1234), and not auto."
        )
    if processes < 1 or not 0 <= process < processes:
        raise InputError(
            f"--process={process} of --processes={processes}: processes are counted from 0, so that the last of "
            f"N is N - 1."
        )


def connect(coordinator: str, processes: int, process: int, *, seconds: int) -> None:
    """Joins the other processes of the run.

    Args:
      coordinator: HOST:PORT of process 0, or "auto".
      processes: how many there are.
      process: which one this is.
      seconds: how long to wait for the others.

    Raises:
      InputError: not all came in time; "auto" where nothing says what the processes are.
    """
    import jax

    _filter_stderr()
    who = "This process" if coordinator == "auto" else f"Process {process} of {processes}"
    print(f"{who} waits for the others, for up to {seconds} s.", flush=True, file=sys.stderr)
    # At its own timeout JAX aborts the process, so this timer must fire first.
    watchdog = threading.Timer(seconds, _give_up, (who, coordinator, seconds))
    watchdog.daemon = True
    watchdog.start()
    try:
        if coordinator == "auto":
            jax.distributed.initialize(initialization_timeout=seconds + 60)
        else:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(coordinator, processes, process, initialization_timeout=seconds + 60)
    except (RuntimeError, ValueError) as error:
        if coordinator == "auto":
            raise InputError(
                f"--coordinator=auto found no cluster to join ({_first_line(error)}); it is for Cloud TPU pods, Slurm "
                "and Open MPI. Elsewhere give --coordinator=HOST:PORT --processes=N --process=I."
            ) from error
        hint = "; is this the host that it names, and the port free?" if process == 0 else "."
        raise InputError(
            f"{who} cannot join --coordinator={coordinator}: {_first_line(error)}{hint}"
        ) from error
    finally:
        watchdog.cancel()


def _give_up(who: str, coordinator: str, seconds: int) -> None:
    print(
        f"error: {who} did not meet the others (--coordinator={coordinator}) within {seconds} s; are all started, and "
        "can they reach that address? --connect_seconds is how long each waits.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


@contextlib.contextmanager
def exits_with_its_peers(*, is_first: bool) -> Iterator[None]:
    """Ends this process at once when its part of the run fails, because the other processes would wait for it. If the
    cause is another process that has ended, it says so in one line.

    Args:
      is_first: whether this is process 0, whose exit aborts the others.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        code = entry.report_error(error)
        if code is None:
            code = 1
            if _PEER_ERROR.search(_first_line(error)):
                print(f"error: {PEER_ENDED} ({_first_line(error)})", file=sys.stderr)
            else:
                traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first:
            time.sleep(_GRACE_SECONDS)
        os._exit(code)  # a normal exit would wait for all processes


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _filter_stderr() -> None:
    """From here on, standard error goes through `stderr_filter`, a process of its own."""
    filter_end, our_end = os.pipe()
    script = Path(__file__).with_name("stderr_filter.py")
    subprocess.Popen([sys.executable, "-I", "-S", str(script)], stdin=filter_end, start_new_session=True)
    os.dup2(our_end, 2)
    os.close(filter_end)
    os.close(our_end)
