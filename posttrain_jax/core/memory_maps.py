"""Drops compiled programs before they take more memory maps than the kernel gives a process.

On a CPU every compiled program maps pages of its own: tens to hundreds of maps, of which Linux gives a process 65,530
(`vm.max_map_count`), and JAX keeps each program for as long as its function lives. A process that needs more dies with
"LLVM compilation error: Cannot allocate memory" or without a message. Code that may compile again and again calls
`make_room` between two pieces of work.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")
LIMIT = Path("/proc/sys/vm/max_map_count")
SHARE = 0.5  # of the limit, at which everything is dropped
SECONDS = 5.0  # between two counts, which take milliseconds; 1,000 maps take longer to compile

_next_count = 0.0


def count_maps() -> int | None:
    """How many memory maps this process has; None where the system does not tell."""
    try:
        with MAPS.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return None


def most_maps() -> int | None:
    """How many it may have; None where the system does not tell."""
    try:
        return int(LIMIT.read_text("ascii"))
    except (OSError, ValueError):
        return None


def make_room() -> bool:
    """Drops all compiled programs if half of the possible maps are in use (what is needed again is compiled again);
    returns whether it did. Costs nothing most of the time."""
    global _next_count
    now = time.monotonic()
    if now < _next_count:
        return False
    _next_count = now + SECONDS
    have, most = count_maps(), most_maps()
    if have is None or most is None or have < SHARE * most:
        return False
    logging.getLogger(__name__).info(
        "%d of %d memory maps are in use: compiled programs are dropped", have, most
    )
    jax.clear_caches()
    return True
