"""Draws the curves of one run, or of several runs in the same diagrams, while they run or afterwards.

The arguments are workdirs. Without --metric the diagrams are those of `curves.png`: each algorithm names its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import entry
from posttrain_jax.core.errors import InputError

EXAMPLE = "python -m launch.plot runs/smollm2 runs/smollm2-lora --out=both.png"

OUT = flags.DEFINE_string(
    "out",
    None,
    "File of the picture (.png, .svg, .pdf); the default is curves.png, of one run in its workdir.",
)
METRIC = flags.DEFINE_list("metric", [], "Metrics to draw, a diagram each, such as train/loss,eval/loss.")


def main(argv: Sequence[str]) -> int:
    """Reads the runs and writes the picture."""
    workdirs = [Path(name).expanduser() for name in argv[1:]]
    if not workdirs:
        raise InputError(f"The workdirs of the runs to draw are needed; an example: {EXAMPLE}")
    out = Path(OUT.value).expanduser() if OUT.value else Path("curves.png")
    if OUT.value is None and len(workdirs) == 1:
        out = workdirs[0] / "curves.png"
    plot(workdirs, out, metrics=METRIC.value)
    print(out)
    return 0


def plot(workdirs: Sequence[Path], out: Path, *, metrics: Sequence[str] = ()) -> None:
    """Draws runs into one picture.

    Args:
      workdirs: of the runs; one that is given twice is drawn once.
      out: the picture.
      metrics: what to draw; () = the panels of the runs' algorithms.

    Raises:
      InputError: a folder without metrics, a metric that no run has logged, a kind of file that cannot be drawn.
    """
    from posttrain_jax.core.types import Panel
    from posttrain_jax.run.curves import plot_curves, read_panels

    workdirs = list(dict.fromkeys(workdirs))
    names = [workdir.resolve().name for workdir in workdirs]
    runs = {
        str(workdir) if names.count(name) > 1 else name: _read(workdir)
        for workdir, name in zip(workdirs, names, strict=True)
    }
    panels = list(dict.fromkeys(panel for workdir in workdirs for panel in read_panels(workdir)))
    if metrics:
        logged = sorted({name for rows in runs.values() for row in rows for name in row} - {"step", "time"})
        for name in metrics:
            if name not in logged:
                near = difflib.get_close_matches(name, logged, n=1, cutoff=0.0)
                hint = f"; the nearest is {near[0]}" if near else ""
                raise InputError(f"--metric={name}: no run has logged it{hint}.")
        panels = [Panel(name, (name,)) for name in metrics]
    try:
        plot_curves(runs, panels, out)
    except ValueError as error:  # matplotlib's sentence about a file's ending
        raise InputError(f"--out={out} cannot be drawn: {error}") from error


def _read(workdir: Path) -> list[dict[str, Any]]:
    from posttrain_jax.run.curves import read_metrics

    path = workdir / "metrics.jsonl"
    try:
        return read_metrics(path)
    except OSError as error:
        raise InputError(
            f"{workdir} is not the workdir of a run that has logged something: {path} cannot be read "
            f"({error.strerror})."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} holds a line that is not JSON: {error}.") from error


if __name__ == "__main__":
    entry.run(main, example=EXAMPLE, takes_arguments=True)
