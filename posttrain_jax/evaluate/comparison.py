"""Two models on the same rows: what `launch.evaluate` wrote for each, paired row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.statistics import Comparison, compare


def compare_rows(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Comparison]:
    """Compares every metric of two results; rows are paired by "id", in any order.

    Args:
      a, b: rows with "id", "metrics" (name -> (sum, count)) and, for tasks, "prompt".
      resamples, seed: see `statistics.compare`.

    Raises:
      InputError: the rows do not belong together: an id that is missing on one side or there twice, another prompt,
        other metrics, or other counts; names the first such row.
    """
    rows_a, rows_b = _by_id(a, "a"), _by_id(b, "b")
    for name, here, there in (("a", rows_a, rows_b), ("b", rows_b, rows_a)):
        alone = [key for key in here if key not in there]
        if alone:
            raise InputError(
                f"The two results are not of the same rows: {len(alone)} of {name}'s {len(here)} rows, the first with "
                f"id {alone[0]!r}, are not in the other one; evaluate both on the same data."
            )
    names = list(next(iter(rows_a.values()))["metrics"]) if rows_a else []
    for key, row in rows_a.items():
        other = rows_b[key]
        if row.get("prompt") != other.get("prompt"):
            raise InputError(
                f"Row {key!r} has another prompt in a than in b; evaluate both on the same data."
            )
        if list(row["metrics"]) != names or list(other["metrics"]) != names:
            raise InputError(
                f"Row {key!r} does not have the same metrics everywhere; were these the same tasks?"
            )
        for name in names:
            if row["metrics"][name][1] != other["metrics"][name][1]:
                raise InputError(
                    f"Row {key!r} counts {row['metrics'][name][1]:g} for {name} in a and {other['metrics'][name][1]:g} "
                    "in b (another tokenizer?), so it cannot be paired."
                )
    return {
        name: compare(
            np.asarray([row["metrics"][name] for row in rows_a.values()], np.float64),
            np.asarray([rows_b[key]["metrics"][name] for key in rows_a], np.float64),
            resamples=resamples,
            seed=seed,
        )
        for name in names
    }


def _by_id(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str | int, Mapping[str, Any]]:
    if not rows:
        raise InputError(f"There is nothing to compare: {name} holds no rows.")
    by_id: dict[str | int, Mapping[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        key = row.get("id")
        if not isinstance(key, str | int) or not _has_metrics(row):
            raise InputError(
                f"Row {number} of {name} has no id or no metrics; it was not written by launch.evaluate."
            )
        if key in by_id:
            raise InputError(f"The id {key!r} is in {name} twice, so its rows cannot be paired.")
        by_id[key] = row
    return by_id


def _has_metrics(row: Mapping[str, Any]) -> bool:
    metrics = row.get("metrics")
    return isinstance(metrics, Mapping) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in metrics.values()
    )
