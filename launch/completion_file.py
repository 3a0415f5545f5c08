"""A file of completions: written one by one, continued after a kill, and put in order when it is complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from posttrain_jax.core.errors import InputError

# These may differ between two starts. They change how completions are computed or where files lie, not what the
# completions are; the last ones are covered by the hash of the prompts.
FREE_OPTIONS = (
    "prompts",
    "prompts_file_sha256",
    "out",
    "batch_size",
    "fsdp",
    "tensor",
    "text_as",
    "chat_template_kwargs",
    "columns",
    "ignore_columns",
    "template_date",
)


def options_path(out: Path) -> Path:
    """The file that holds the options of `out`."""
    return out.with_name(f"{out.name}.options.json")


def write_description(out: Path, description: dict[str, Any]) -> None:
    """Writes the options of the completions beside `out`, atomically."""
    partial = options_path(out).with_suffix(".partial")
    partial.write_text(json.dumps(description, indent=2) + "\n", "utf-8")
    partial.replace(options_path(out))


def completed_samples(
    out: Path, expected: list[tuple[str | int, int]], description: dict[str, Any]
) -> set[tuple[str | int, int]]:
    """The (id, sample) pairs that `out` holds already; a torn last line is cut off.

    Raises:
      InputError: it holds completions of other prompts, or ones made with other options.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            return set()
        _check_description(out, description)
        return set(_complete_rows(out, set(expected)))
    except OSError as error:
        raise InputError(f"--out={out} cannot be used ({error.strerror}).") from error


def put_in_order(out: Path, expected: list[tuple[str | int, int]]) -> None:
    """Rewrites a complete `out` in the order of the prompts, atomically; leaves one in order as it is."""
    rows = _complete_rows(out, set(expected))
    if list(rows) == expected:
        return
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_bytes(b"".join(rows[key] for key in expected))
        partial.replace(out)
    except OSError as error:
        raise InputError(
            f"--out={out} is complete but could not be put in the order of the prompts ({error.strerror})."
        ) from error


def _check_description(out: Path, description: dict[str, Any]) -> None:
    path = options_path(out)
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError:
        before = {}
    differing = [
        f"{key} ({before.get(key)!r} then, {value!r} now)"
        for key, value in description.items()
        if before.get(key) != value and key not in FREE_OPTIONS
    ]
    if differing and out.stat().st_size:
        raise InputError(
            f"--out={out} was made with other options: {'; '.join(differing)}. Use the same ones to continue, or "
            "another --out."
        )


def _complete_rows(out: Path, expected: set[tuple[str | int, int]]) -> dict[tuple[str | int, int], bytes]:
    """The file's lines by (id, sample), in its order."""
    rows: dict[tuple[str | int, int], bytes] = {}
    complete = 0
    with out.open("rb") as file:
        for line in file:
            row = _parsed(line)
            if row is None:
                break
            key = (row.get("id"), row.get("sample"))
            if key not in expected or key in rows:
                raise InputError(
                    f"{out}:{len(rows) + 1} does not complete a prompt of --prompts, or completes it a second time; "
                    "remove the file or give another --out."
                )
            rows[key] = line
            complete += len(line)
        rest = file.read()
    if rest.strip():
        raise InputError(
            f"{out}:{len(rows) + 1} is not a row of completions; remove the file or give another --out."
        )
    if complete < out.stat().st_size:
        os.truncate(out, complete)
    return rows


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The row in a line, or None for a line that was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def append(file: BinaryIO, row: dict[str, Any]) -> None:
    """Writes a row so that a kill can tear the last one only."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    file.write(text.encode("utf-8", "replace"))
    file.flush()
