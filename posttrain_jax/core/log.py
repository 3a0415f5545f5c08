"""Lines for the person who watches a run."""

from __future__ import annotations

import sys

import jax


def log_on_host0(text: str) -> None:
    """Prints a line on process 0, at once."""
    if jax.process_index() == 0:
        print(text, flush=True, file=sys.stdout)
