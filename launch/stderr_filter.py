"""Passes on the standard error of a process that JAX may abort, and puts one sentence in place of the abort's output.

`launch/processes.py` starts this file as a process of its own, because an aborted process cannot print any more. It
imports the standard library alone.
"""

from __future__ import annotations

import re
import sys

PEER_ENDED = (
    "Another process of this run has ended or cannot be reached, so this one ends too; see what that process printed, "
    "and start all of them again with the same command to resume from the last checkpoint."
)
_START = re.compile(rb"[EF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (coordination_service|client\.h|preemption_sync)")
_ABORTED = re.compile(rb"F\d{4} |\*\*\* Check failure|Fatal Python error")


def main() -> None:
    """Copies lines to standard error. From the coordination service's first line on, lines are held until the end."""
    held: list[bytes] = []
    for line in sys.stdin.buffer:
        if held or _START.match(line):
            held.append(line)
        else:
            _write(line)
    aborted = any(_ABORTED.match(line) for line in held)
    _write(f"error: {PEER_ENDED}\n".encode() if aborted else b"".join(held))


def _write(text: bytes) -> None:
    try:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()
    except OSError:  # the reader is gone
        pass


if __name__ == "__main__":
    main()
