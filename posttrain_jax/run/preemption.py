"""Signals that ask a run to end: it saves first, and the same command goes on from there."""

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
)  # of a scheduler, of a terminal that is gone, of Ctrl-C


def asked_to_end() -> list[signal.Signals]:
    """Those of SIGNALS that this process listens to: `nohup` and a shell's background jobs ignore some."""
    return [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]


class Preemption:
    """Notices SIGTERM, SIGHUP and Ctrl-C; with several processes, all stop at the same step.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._seen = False
        self._several = jax.process_count() > 1
        # Of several processes JAX itself hears SIGTERM, and tells the others.
        own = [signum for signum in asked_to_end() if not (self._several and signum == signal.SIGTERM)]
        self._previous = {signum: signal.signal(signum, self._note) for signum in own}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self._seen:
            again = "; again: it ends at once" if signum == signal.SIGINT else ""
            told = f"{signal.Signals(signum).name}: the run saves after this step and ends{again}.\n"
            with contextlib.suppress(OSError):  # `print` may be under way where this came in between
                os.write(1, told.encode())
        self._seen = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_after(self, step: int) -> bool:
        """Whether `step`, which was just dispatched, is the last."""
        if not self._several:
            return self._seen
        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Gives the signals back."""
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
