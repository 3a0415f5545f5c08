"""`curves.png`: the metrics of one or several runs over their steps, in the panels that the algorithms name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.core.types import Panel

TRAINING = (
    Panel("learning rate", ("train/lr",)),
    Panel("gradient norm", ("train/grad_norm",)),
    Panel("tokens per second", ("train/tokens_per_second",)),
)
"""What an algorithm that learns from rows draws after its own panels."""
ROLLOUTS = (
    Panel("score", ("train/score", "eval/score", "eval/gold")),
    Panel("KL to the reference (nats per sequence)", ("train/kl_per_sequence",)),
    Panel("entropy (nats per token)", ("train/entropy_per_token",)),
    Panel("completion length (tokens)", ("train/completion_tokens", "eval/completion_tokens")),
    Panel("share of completions without EOS", ("train/no_eos_share", "eval/no_eos_share")),
    Panel("seconds per step", ("train/seconds_generate", "train/seconds_score", "train/seconds_train")),
)
"""What an algorithm that learns from its own completions draws before its own panels."""
DEFAULT = (Panel("loss", ("train/loss", "eval/loss")), *TRAINING)
PANELS_FILE = "panels.json"
COLUMNS = 4  # panels side by side
FEW_POINTS = 30  # a line of fewer points shows each of them


def write_panels(workdir: Path, panels: Sequence[Panel]) -> None:
    """Writes the panels of a run into its workdir, where `launch.plot` reads them."""
    text = json.dumps([dataclasses.asdict(panel) for panel in panels], ensure_ascii=False, indent=1)
    (workdir / PANELS_FILE).write_text(text + "\n", "utf-8")


def read_panels(workdir: Path) -> tuple[Panel, ...]:
    """The panels of a run; those of any run where its workdir has none."""
    try:
        listed = json.loads((workdir / PANELS_FILE).read_text("utf-8"))
        return tuple(Panel(str(one["title"]), tuple(map(str, one["metrics"]))) for one in listed)
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; a torn last line of a run that goes on is left out."""
    *lines, torn = path.read_bytes().split(b"\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    with contextlib.suppress(ValueError):
        rows.append(json.loads(torn))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def plot_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], panels: Sequence[Panel], out: Path) -> None:
    """Draws the panels, each with a line for every run and metric.

    Args:
      runs: logged rows by the run's name, which is in the legends where there are several.
      panels: those without a number in any run are left out.
      out: a file whose ending matplotlib knows (.png, .svg, .pdf).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [
        panel
        for panel in panels
        if any(_points(rows, name) for rows in runs.values() for name in panel.metrics)
    ]
    shown = shown or list(panels[:1])
    columns = min(len(shown), COLUMNS)
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.2 * lines), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, shown, strict=False):
        for run, rows in runs.items():
            for name in panel.metrics:
                points = _points(rows, name)
                if points:
                    steps, values = np.asarray(points, dtype=float).T
                    label = f"{run} {name}" if len(runs) > 1 else name
                    marker = "o" if len(points) < FEW_POINTS else None
                    axis.plot(steps, values, label=label, marker=marker, markersize=3)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if _fits_a_float(row.get(name))]


def _fits_a_float(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < sys.float_info.max
