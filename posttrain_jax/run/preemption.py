"""Signals that ask a run to end. The run saves a checkpoint first, and the same command resumes it."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
)  # sent by a scheduler, by a closed terminal, by Ctrl-C


def handled_signals() -> list[signal.Signals]:
    """The SIGNALS that this process does not ignore (`nohup` and background jobs of a shell ignore some)."""
    return [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]


class PreemptionHandler:
    """Notices SIGTERM, SIGHUP and Ctrl-C. With several processes, all of them stop after the same step.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._seen = False
        self._several = jax.process_count() > 1
        # With several processes, JAX itself handles SIGTERM and tells the other processes.
        handled = [signum for signum in handled_signals() if not (self._several and signum == signal.SIGTERM)]
        self._previous = {signum: signal.signal(signum, self._on_signal) for signum in handled}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self._seen:
            again = " (press Ctrl-C again to end at once)" if signum == signal.SIGINT else ""
            message = f"{signal.Signals(signum).name}: the run saves after this step and ends{again}.\n"
            with contextlib.suppress(OSError):  # not `print`: the signal may have interrupted one
                os.write(1, message.encode())
        self._seen = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_after(self, step: int) -> bool:
        """Whether the run ends after `step`, which was just dispatched."""
        if not self._several:
            return self._seen
        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Restores the previous signal handlers."""
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
