"""Names of rewards that fit into a metric's name."""

from __future__ import annotations

import re
from collections.abc import Sequence


def short_names(rewards: Sequence[str]) -> dict[str, str]:
    """Each reward's short name: of "module:function" the function, of a folder or a hub's name its last part. Where two
    would be alike, as many parts as tell them apart: `runs/a/rm` and `runs/b/rm` are `a/rm` and `b/rm`."""
    parts = {name: [part for part in re.split(r"[/:]", name) if part] or [name] for name in rewards}
    count = dict.fromkeys(rewards, 1)

    def short(name: str) -> str:
        return "/".join(parts[name][-count[name] :])

    while True:
        alike = {name for name in parts for other in parts if other != name and short(other) == short(name)}
        longer = [name for name in alike if count[name] < len(parts[name])]
        if not longer:
            break
        for name in longer:
            count[name] += 1
    return {name: name if name in alike else short(name) for name in rewards}
