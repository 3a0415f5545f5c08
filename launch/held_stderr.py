"""Standard error on its way out of a process that JAX may abort: passed on, but for what the abort writes.

`launch/processes.py` starts this file as a process, for the aborted one can say nothing any more. It needs the
standard library alone.
"""

from __future__ import annotations

import re
import sys

SENTENCE = (
    "Another process of this run has ended or cannot be reached, so this one ends too; see what that one said, and "
    "start all of them again with the same command to go on from the last checkpoint."
)
_START = re.compile(rb"[EF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (coordination_service|client\.h|preemption_sync)")
_ABORTED = re.compile(rb"F\d{4} |\*\*\* Check failure|Fatal Python error")


def main() -> None:
    """Passes lines on; from the first of the coordination service's on they are held to the end."""
    held: list[bytes] = []
    for line in sys.stdin.buffer:
        if held or _START.match(line):
            held.append(line)
        else:
            _write(line)
    aborted = any(_ABORTED.match(line) for line in held)
    _write(f"error: {SENTENCE}\n".encode() if aborted else b"".join(held))


def _write(text: bytes) -> None:
    try:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()
    except OSError:  # nobody reads it
        pass


if __name__ == "__main__":
    main()
