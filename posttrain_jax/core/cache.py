"""The folder of what can be made again: downloads, tokenized data, reference log-probabilities."""

from __future__ import annotations

import os
import pathlib


def cache_root() -> pathlib.Path:
    """The folder for everything that can be made again: `$POSTTRAIN_CACHE`, else `~/.cache/posttrain_jax`."""
    chosen = os.environ.get("POSTTRAIN_CACHE")
    return pathlib.Path(chosen).expanduser() if chosen else pathlib.Path.home() / ".cache" / "posttrain_jax"
