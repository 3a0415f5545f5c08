"""Writes the golden text of every config: `python tests/configs/write_golden.py`, from the repository's root.

Run it after a config was changed on purpose, and read the diff: it is what the change means, key by key.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(ROOT))

from launch.config import flatten, load_file


def specs() -> list[str]:
    """Every config file, plain and with each variant that its docstring names."""
    found = []
    for path in sorted((ROOT / "configs").rglob("*.py")):
        text = path.read_text()
        if "def get_config(" not in text:
            continue
        name = str(path.relative_to(ROOT))
        docstring = text.split('"""')[1]
        found += [name, *(f"{name}:{variant}" for variant in sorted(set(re.findall(r"`:(\w+)`", docstring))))]
    return found


def golden_path(spec: str) -> Path:
    """configs/sft/x.py:tiny -> golden/sft.x.tiny.txt."""
    return GOLDEN / (
        spec.removeprefix("configs/").replace(".py", "").replace("/", ".").replace(":", ".") + ".txt"
    )


def render(spec: str) -> str:
    """Every resolved key and its value, one a line."""
    flat = flatten(load_file(str(ROOT / spec)))
    return "".join(f"{key} = {flat[key]!r}\n" for key in sorted(flat))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for one in specs():
        golden_path(one).write_text(render(one))
