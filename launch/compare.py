"""Compares two models on the same rows: pairs what launch.evaluate wrote for each, and tests the differences.

For each metric: both values and b - a with 95 % intervals (bootstrap over rows, both models on the same resampled
rows), on how many rows b is better and worse, the exact sign test of these (McNemar's exact test where a row is right
or wrong), and a paired permutation test of the difference. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import entry
from posttrain_jax.core.errors import InputError

EXAMPLE = "python -m launch.compare --a=runs/base-ifeval --b=runs/tuned-ifeval"


def define_flags() -> None:
    """The command line; not at import, so that modules with like-named flags can be imported together."""
    flags.DEFINE_string("a", None, "A folder that launch.evaluate wrote.")
    flags.DEFINE_string("b", None, "Another one, of the same rows; differences are b - a.")
    flags.DEFINE_string("out", None, "JSON file to write; default: comparison.json in b.")
    flags.DEFINE_integer("resamples", 10_000, "Of the bootstrap and of the permutation test.")
    flags.DEFINE_integer("seed", 0, "Of both.")


def main(argv: Sequence[str]) -> int:
    """Compares, prints and writes."""
    del argv
    given = flags.FLAGS
    if given.a is None or given.b is None:
        raise InputError(f"--a and --b are needed; an example: {EXAMPLE}")
    out = Path(given.out) if given.out else Path(given.b) / "comparison.json"
    compare(Path(given.a), Path(given.b), out, resamples=given.resamples, seed=given.seed)
    return 0


def compare(a: Path, b: Path, out: Path, *, resamples: int, seed: int) -> dict[str, Any]:
    """Compares two folders; what it returns is also in `out`.

    Raises:
      InputError: a file is missing or damaged, or the rows do not belong together.
    """
    from posttrain_jax.evaluate.comparison import compare_rows

    if resamples < 1:
        raise InputError(f"--resamples is {resamples}; it must be at least 1.")
    if seed < 0:
        raise InputError(f"--seed is {seed}; it must be 0 or more.")
    found = compare_rows(read_rows_of(a), read_rows_of(b), resamples=resamples, seed=seed)
    record = {
        "a": str(a),
        "b": str(b),
        "resamples": resamples,
        "seed": seed,
        "metrics": {name: dataclasses.asdict(comparison) for name, comparison in found.items()},
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.partial")
        partial.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        partial.replace(out)
    except OSError as error:
        raise InputError(f"The comparison cannot be written to {out}: {error.strerror}.") from error
    print(table(record))
    print(f"Written to {out}.")
    return record


def read_rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows that launch.evaluate wrote into a folder.

    Raises:
      InputError: there is no finished evaluation, or its rows are damaged; names file and line.
    """
    from posttrain_jax.data.sources import read_rows

    for name in ("results.json", "rows.jsonl"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; give a folder that launch.evaluate has finished.")
    rows = []
    for row in read_rows(str(folder / "rows.jsonl")):
        if row.error is not None:
            raise InputError(f"{row.source}, line {row.line}: {row.error}; evaluate again.")
        rows.append(row.value)
    return rows


def table(record: dict[str, Any]) -> str:
    """One line for each metric."""
    lines = [
        f"{'':26}{'a':>10}{'b':>10}{'b - a':>10}{'95 % interval':>22}{'better':>8}{'worse':>7}{'sign p':>9}"
        f"{'permutation p':>15}"
    ]
    for name, found in record["metrics"].items():
        difference = found["difference"]
        lines.append(
            f"{name:26}{found['a']['value']:10.4f}{found['b']['value']:10.4f}{difference['value']:+10.4f}"
            f"{difference['low']:+12.4f}{difference['high']:+10.4f}{found['better']:8}{found['worse']:7}"
            f"{found['sign_p']:9.4f}{found['permutation_p']:15.4f}"
        )
    rows = next(iter(record["metrics"].values()))["rows"]
    return "\n".join([*lines, f"{rows:,} rows; better and worse: rows where b's sum is above, below a's"])


if __name__ == "__main__":
    define_flags()
    entry.run(main, example=EXAMPLE)
