"""Metrics on their way out: sums become numbers, numbers become JSON Lines, TensorBoard, W&B and a line of text.

Only process 0 writes. `metrics.jsonl` is what a resumed run must continue without a trace, so a restart cuts off
the lines that lie beyond the checkpoint it restarts from.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.types import Metric, Metrics


class Accumulator:
    """Adds `Metric`s over steps, on the host, in float64; can be saved and restored exactly."""

    def __init__(self, state: dict[str, list[float]] | None = None):
        self._sums: dict[str, list[float]] = {name: list(pair) for name, pair in (state or {}).items()}

    def add(self, metrics: dict[str, Metric]) -> None:
        for name, metric in metrics.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            total[0] += float(metric.sum)
            total[1] += float(metric.count)

    def state(self) -> dict[str, list[float]]:
        return {name: list(pair) for name, pair in self._sums.items()}

    def sum(self, name: str) -> float:
        return self._sums.get(name, [0.0, 0.0])[0]

    def flush(self) -> dict[str, float]:
        """Every metric's mean, and starts again. A metric that counted nothing is left out."""
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums = {}
        return means


def to_host(metrics: Metrics) -> dict[str, Metric]:
    """Waits for the device and fetches all metrics in one transfer."""
    return jax.device_get(metrics)


def truncate_after(path: Path, step: int) -> None:
    """Drops the lines of a JSON Lines file whose "step" lies beyond `step`, and a torn last line. Atomic.

    Lines that are not as they were written (an object with a whole "step") are dropped too, and counted in a line.
    """
    if not path.is_file():
        return
    kept, odd = [], 0
    *whole, torn = path.read_bytes().split(b"\n")
    for line in [*whole, torn] if _step_of(torn) is not None else whole:
        found = _step_of(line)
        if found is None:
            odd += bool(line.strip())
        elif found <= step:
            kept.append(line)
    if odd and step >= 0:
        log_on_host0(f"{path}: {odd} lines that are no objects with a step were dropped.")
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    partial.replace(path)


def _step_of(line: bytes) -> int | None:
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON object as one line, in one write."""
    with path.open("ab") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def as_json(values: dict[str, float]) -> dict[str, float | str]:
    """NaN and infinities as strings ("nan"), for JSON has no numbers for them."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


class _Board:
    """TensorBoard events, written here and now: tensorboardX's own writer has a thread that a full disk kills,
    after which the run would wait for it forever."""

    def __init__(self, folder: Path, *, last_kept: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        self._scalar = scalar
        self._writer = EventsWriter(str(folder / "events"))
        # TensorBoard forgets what an earlier start of this run wrote beyond the checkpoint.
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=last_kept + 1, session_log=restart))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.write_event(
                self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            )

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def wandb_id(path: Path, *, new: bool) -> str:
    """The run's name at W&B, drawn when it starts from the beginning: a folder's name may be used again."""
    if new or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{secrets.token_hex(8)}\n")
    return path.read_text().strip()


class MetricsWriter:
    """`metrics.jsonl`, TensorBoard events, and W&B if asked, for one run.

    Args:
      workdir: the run's folder.
      last_kept: what an earlier start logged beyond this step is cut off; -1 = all of it.
      tensorboard: whether to write events for it.
      wandb_project: "" = off.
      config: shown by W&B.
    """

    def __init__(self, workdir: Path, *, last_kept: int, tensorboard: bool, wandb_project: str, config: dict):
        self._path = workdir / "metrics.jsonl"
        self._board: _Board | None = None
        self._wandb: Any = None
        self.active = jax.process_index() == 0
        if not self.active:
            return
        truncate_after(self._path, last_kept)
        if tensorboard:
            self._board = _Board(workdir / "tensorboard", last_kept=last_kept)
        if wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise InputError(
                    'log.wandb_project needs the package wandb: pip install -e ".[wandb]", or leave it "".'
                ) from error
            run_id = wandb_id(workdir / "wandb_id", new=last_kept < 0)
            try:
                self._wandb = wandb.init(
                    project=wandb_project,
                    name=workdir.name,
                    id=run_id,
                    resume="allow",
                    config=config,
                    dir=workdir,
                )
            except wandb.Error as error:
                said = " ".join(str(error).split())
                raise InputError(
                    f"log.wandb_project is {wandb_project!r}, and W&B says: {said} WANDB_MODE=offline writes into the "
                    "workdir alone."
                ) from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """One logged step."""
        if not self.active:
            return
        append_line(self._path, {"step": step, "time": time.time(), **as_json(values)})
        if self._board is not None:
            self._board.write(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def sync(self) -> None:
        """Makes what was written survive a power cut."""
        if self.active and self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; MFU is shown only for these.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device kind, or None when it is not in the table."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def progress_line(step: int, steps: int, values: dict[str, float], eta_seconds: float) -> str:
    """One line for a person: how far, how long still, how it goes."""
    hours, rest = divmod(int(max(eta_seconds, 0)), 3600)
    parts = [f"step {step}/{steps}"]
    if "train/loss" in values:
        parts.append(f"loss {values['train/loss']:.4f}")
    if "train/lr" in values:
        parts.append(f"lr {values['train/lr']:.2e}")
    if "train/grad_norm" in values:
        parts.append(f"grad norm {values['train/grad_norm']:.2f}")
    if "train/tokens_per_second" in values:
        parts.append(f"{values['train/tokens_per_second']:,.0f} tokens/s")
    if "train/padding_share" in values:
        parts.append(f"padding {values['train/padding_share']:.1%}")
    if "train/mfu" in values:
        parts.append(f"MFU {values['train/mfu']:.1%}")
    if values.get("train/skipped"):
        parts.append(f"skipped {values['train/skipped']:.0f}")
    parts.append(f"ETA {hours:d}:{rest // 60:02d}:{rest % 60:02d}")
    return "  ".join(parts)


OFFLINE_PANELS = (
    ("loss (nats per trained token)", ("train/loss", "eval/loss")),
    ("learning rate", ("train/lr",)),
    ("gradient norm", ("train/grad_norm",)),
    ("tokens per second", ("train/tokens_per_second",)),
)
ONLINE_PANELS = (
    ("score", ("train/score", "eval/score", "eval/gold")),
    ("KL to the reference (nats per sequence)", ("train/kl_per_sequence",)),
    ("entropy (nats per token)", ("train/entropy_per_token",)),
    ("clip fraction, share without an end", ("train/clip_fraction", "train/no_eos_share")),
)


def _fits_a_float(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < sys.float_info.max


def plot_curves(metrics_path: Path, out: Path) -> None:
    """`curves.png` from a `metrics.jsonl`: losses, learning rate, speed; where answers were scored, score and KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics_path.read_bytes().split(b"\n") if line]
    panels = ONLINE_PANELS if any("train/score" in row for row in rows) else OFFLINE_PANELS
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), constrained_layout=True)
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if _fits_a_float(row.get(name))]
            if points:
                steps, values = np.asarray(points, dtype=float).T
                axis.plot(steps, values, label=name, marker="o" if len(points) < 30 else None, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)
