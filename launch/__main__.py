"""The command `posttrain-jax NAME ...`: runs `python -m launch.NAME ...` from any folder."""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import sys
from pathlib import Path

PROGRAM = "posttrain-jax"
NOT_COMMANDS = ("__main__", "stderr_filter")


def commands() -> dict[str, str]:
    """Every entry point in `launch/` with the first sentence of its docstring, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text("utf-8")
        if "\nif __name__ ==" in text and path.stem not in NOT_COMMANDS:
            docstring = ast.get_docstring(ast.parse(text)) or ""
            found[path.stem] = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    return found


def main() -> None:
    """Runs the command that the first argument names; never returns where it does."""
    known = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        width = max(map(len, known)) + 2
        print(f"usage: {PROGRAM} COMMAND [flags]      ({PROGRAM} COMMAND --help lists the flags)\n")
        print("\n".join(f"  {command:<{width}}{text}" for command, text in known.items()))
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        print(
            f"error: {PROGRAM} has no command {name!r}; the nearest is {near!r}, and {PROGRAM} --help lists all.",
            file=sys.stderr,
        )
        sys.exit(2)
    # As with `python -m`, modules in the working directory (such as a reward function's) can be imported.
    sys.path.append(os.getcwd())
    del sys.argv[1]
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
