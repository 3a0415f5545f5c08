"""The config.json of a run, of this version or an earlier one, as this version has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.schema import Leaf, all_leaves, convert, flat_keys
from posttrain_jax.wiring.algorithms import own_sections, sections_of
from posttrain_jax.wiring.key_names import RENAMED


def read_run(workdir: Path) -> dict[str, Any]:
    """The nested config of the run in a workdir; every key of today's is there, and no other.

    Raises:
      InputError: the file is missing, or is not what a run writes.
    """
    path = workdir / "config.json"
    flat = read_saved(path)
    known = all_leaves(sections_of(flat["algorithm"]))
    flat = {key: value for key, value in flat.items() if key in known}  # not what another version had besides
    sections = {key.rpartition(".")[0] for key in flat}
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        above, _, name = key.rpartition(".")
        place = nested
        for part in filter(None, above.split(".")):
            place = place.setdefault(part, {})
        if key in sections or not isinstance(place, dict):
            raise InputError(f"{path}: {key} is {shown(value)}, which no run writes there; restore the file.")
        place[name] = value
    return nested


def read_saved(path: Path) -> dict[str, Any]:
    """A config.json by dotted keys, as this version would have written it.

    Keys have today's names, what was JSON in a text is nested, sections of other algorithms are left out, and a key
    that the run's version did not have has its default: the run did what the default does.

    Raises:
      InputError: the file cannot be read, or is not what a run writes.
    """
    try:
        saved = json.loads(path.read_text("utf-8"))
        known = all_leaves(sections_of(saved.get("algorithm", "sft")))
        own = {key.partition(".")[0] for key in known}
        read = {}
        for old, value in flat_keys(saved, known).items():
            key = RENAMED.get(old, old)
            section = key.partition(".")[0]
            if section in own or section not in own_sections():
                read[key] = _value(known[key], value) if key in known else value
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is no config in JSON ({str(error)[:100]}); restore it, or use a new --workdir."
        ) from error
    return {**{key: _plain(leaf.default) for key, leaf in known.items()}, **read}


def _value(leaf: Leaf, value: Any) -> Any:
    try:
        return _plain(convert(leaf, value))
    except InputError:
        return value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
