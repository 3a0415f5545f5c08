"""The house's floors, read from the source: imports point down only (the table is in CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

FLOORS = {
    "posttrain_jax": 0,  # the package's __init__: it imports nothing at import time
    "posttrain_jax.core": 0,
    "posttrain_jax.losses": 1,
    "posttrain_jax.data": 1,
    "posttrain_jax.demo": 1,
    "posttrain_jax.run": 1,
    "posttrain_jax.models": 2,
    "posttrain_jax.forward": 3,
    "posttrain_jax.sampling": 4,
    "posttrain_jax.rewards": 5,
    "posttrain_jax.serving": 5,
    "posttrain_jax.rollouts": 6,
    "posttrain_jax.algorithms": 7,
    "posttrain_jax.wiring": 8,
    "posttrain_jax.evaluate": 9,
    "configs": 10,
    "launch": 10,
    "experiments": 11,
}
PACKAGES = ("posttrain_jax", "configs", "launch", "experiments")
# What an algorithm says of itself, and the half of the reward model that is no step.
SHARED_BY_ALGORITHMS = ("posttrain_jax.algorithms.contract", "posttrain_jax.algorithms.reward_scale")
FORBIDDEN_NAMES = {"utils", "util", "misc", "common", "helpers", "helper"}


def sources() -> dict[str, pathlib.Path]:
    """Module name -> file, for everything in the house."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if any(part.startswith(".") for part in parts):
                continue
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str | None:
    """The room that a module lies in: the longest name in FLOORS that it starts with."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    if parts[0] != "posttrain_jax" or len(parts) == 1:
        return parts[0]
    return ".".join(parts[:2])


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import, wherever it stands; `if TYPE_CHECKING:` counts too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                up = here[: len(here) - node.level + (1 if is_package else 0)]
                base = ".".join([*up, base] if base else up)
            # `from posttrain_jax import run` names a room in its alias.
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base in PACKAGES else base


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a module's source does that its place in the house forbids, one sentence each."""
    wrong = []
    room = room_of(module)
    if room not in FLOORS:
        return [f"{module} lies in the room {room}, which FLOORS does not place"]
    for line, imported in imports_of(ast.parse(source), module, is_package):
        where = f"{module}:{line} imports {imported}"
        top = imported.split(".")[0]
        if top == "flax" and room != "posttrain_jax.models":
            wrong.append(f"{where}: flax is used inside posttrain_jax/models only")
        if top in ("jax", "jaxlib", "flax", "optax") and room == "posttrain_jax.data":
            wrong.append(f"{where}: data is host NumPy, without jax")
        target = room_of(imported)
        if target == room == "posttrain_jax.algorithms" and imported not in SHARED_BY_ALGORITHMS:
            wrong.append(f"{where}: an algorithm imports no other algorithm")
        if target is None or target == room:
            continue
        if target not in FLOORS:
            # `from posttrain_jax import load`: a name of the package itself.
            target = "posttrain_jax"
        if module == "posttrain_jax":
            # The package's functions import what they need when they are called.
            continue
        if FLOORS[target] > FLOORS[room]:
            wrong.append(f"{where}: floor {FLOORS[room]} looks up to floor {FLOORS[target]}")
        elif FLOORS[target] == FLOORS[room] and {room, target} != {"launch", "configs"} and FLOORS[room] > 0:
            wrong.append(f"{where}: {room} and {target} share floor {FLOORS[room]}")
    return wrong


def test_imports_point_down():
    wrong = []
    for module, path in sources().items():
        wrong += violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not wrong, "\n".join(["the floors (the table is in CONTRIBUTING.md) are broken:", *wrong])


def test_no_drawer_for_odds_and_ends():
    names = {path.stem for path in sources().values()} | {path.parent.name for path in sources().values()}
    assert not names & FORBIDDEN_NAMES, "name a file after what is in it"


def test_importing_the_package_loads_no_room():
    """`import posttrain_jax` must stay free: the imports of its __init__ stand inside functions."""
    tree = ast.parse((ROOT / "posttrain_jax/__init__.py").read_text(encoding="utf-8"))
    top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in top_level if isinstance(node, ast.ImportFrom)] == ["__future__", "typing"]
    assert len(top_level) == 2


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("posttrain_jax.losses.dpo", "from posttrain_jax.models import transformer", "looks up"),
        ("posttrain_jax.data.loader", "from posttrain_jax.run import checkpoint", "share floor 1"),
        ("posttrain_jax.data.loader", "def f():\n    import jax.numpy as jnp", "host NumPy"),
        ("posttrain_jax.core.optim", "import flax.linen as nn", "inside posttrain_jax/models only"),
        ("posttrain_jax.algorithms.sft", "from ..wiring import data", "looks up"),
        ("posttrain_jax.run.loop", "import launch.train", "looks up"),
        ("posttrain_jax.data.loader", "from ..demo import assets", "share floor 1"),
        (
            "posttrain_jax.algorithms.kto",
            "from posttrain_jax.algorithms.dpo import Options",
            "no other algorithm",
        ),
        ("posttrain_jax.algorithms.kto", "from posttrain_jax.algorithms import dpo", "no other algorithm"),
        ("posttrain_jax.attic.thing", "", "does not place"),
    ],
)
def test_the_rules_bite(module, source, reason):
    found = violations(module, source)
    assert len(found) == 1 and reason in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("posttrain_jax.models.io.gguf", "from posttrain_jax.models.config import ModelConfig\nimport flax"),
        ("posttrain_jax.core.masking", "from posttrain_jax.core.types import Array"),
        ("posttrain_jax.algorithms.kto", "from posttrain_jax.algorithms.contract import Steps"),
        ("launch.train", "from configs.sft import smollm2_135m"),
        ("experiments.bench.sft", "import launch.train, torch"),
        ("posttrain_jax.run.loop", "from posttrain_jax.run import checkpoint, metrics"),
    ],
)
def test_the_rules_allow(module, source):
    assert violations(module, source) == []
