"""Metrics on their way out: sums become numbers, and numbers go to JSON Lines, TensorBoard and W&B.

Only process 0 writes. `metrics.jsonl` is what a resumed run must continue without a trace, so a restart cuts off
the lines that lie beyond the checkpoint it restarts from.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.types import Metric, Metrics

TENSORBOARD_SAMPLES = 16  # texts of an evaluation


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

    A line that is not an object with an integer "step" is dropped too; how many there were is logged.
    """
    if not path.is_file():
        return
    kept, malformed = [], 0
    *complete, torn = path.read_bytes().split(b"\n")
    for line in [*complete, torn] if _step_of(torn) is not None else complete:
        line_step = _step_of(line)
        if line_step is None:
            malformed += bool(line.strip())
        elif line_step <= step:
            kept.append(line)
    if malformed and step >= 0:
        log_on_host0(f"{path}: {malformed} lines that are no objects with a step were dropped.")
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    partial.replace(path)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON object as one line, in one write."""
    with path.open("ab") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def as_json(values: dict[str, float]) -> dict[str, float | str]:
    """NaN and infinities as strings ("nan"), for JSON has no numbers for them."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def sample_markdown(row: Mapping[str, Any]) -> str:
    """A row of `samples.jsonl` as TensorBoard shows it: prompt and completion as they are, line by line, and the score.

    TensorBoard reads texts as Markdown, in which a line indented by four spaces is shown as it is.
    """

    def verbatim(text: str) -> str:
        return "\n".join(f"    {line}" for line in text.splitlines() or [""])

    score = f"\n\nscore {row['score']:.4g}" if "score" in row else ""
    prompt = (
        row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
    )
    shown = f"{verbatim(prompt)}\n\n---\n\n{verbatim(row['completion'])}{score}"
    return shown.encode("utf-8", "replace").decode(
        "utf-8"
    )  # half a character, as a cut completion may end with


class _Board:
    """TensorBoard events, written here and now: tensorboardX's own writer has a thread that a full disk kills,
    after which the run would wait for it forever."""

    def __init__(self, folder: Path, *, last_kept: int):
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar, text
        except ImportError as error:
            raise InputError(
                "log.tensorboard needs the package tensorboardX: pip install tensorboardX, or set "
                "--config.log.tensorboard=false."
            ) from error

        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        self._scalar = scalar
        self._text = text
        self._writer = EventsWriter(str(folder / "events"))
        # TensorBoard forgets what an earlier start of this run wrote beyond the checkpoint.
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=last_kept + 1, session_log=restart))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.write_event(
                self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            )

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The first samples as texts, each under a name of its own, so that a slider shows how it changes."""
        for number, row in enumerate(rows[:TENSORBOARD_SAMPLES]):
            summary = self._text(f"sample {number}", sample_markdown(row))
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def wandb_id(path: Path, *, new: bool) -> str:
    """The run's id at W&B, drawn when it starts from the beginning, for a folder's name may be used again."""
    if new or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{secrets.token_hex(8)}\n")
    return path.read_text().strip()


class MetricsWriter:
    """`metrics.jsonl`, TensorBoard events, and W&B if asked, for one run.

    Args:
      workdir: the run's folder.
      last_kept: lines of an earlier start beyond this step are dropped; -1 = all of them.
      tensorboard: whether to write TensorBoard events.
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
                message = " ".join(str(error).split())
                raise InputError(
                    f"log.wandb_project is {wandb_project!r}, and W&B says: {message} WANDB_MODE=offline writes into "
                    "the workdir alone."
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

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The samples of an evaluation, into TensorBoard's texts."""
        if self._board is not None:
            self._board.write_samples(step, rows)

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
