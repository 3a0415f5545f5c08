"""The one training loop. It is handed a `Task` (a state, a collector of batches, a jitted step, an evaluation)
and knows no algorithm.

Step t + 1 is dispatched before the metrics of step t are read (`Task.ahead`), so the devices never wait for the host.
Everything that a run writes can be cut back to a checkpoint, so a run that was killed at any moment and started again
ends with the same parameters and the same `metrics.jsonl` as one that was not.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

from posttrain_jax.core.errors import InputError, StepNotTaken
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.types import CollectorState, Metric, Metrics, Task, TrainState
from posttrain_jax.core.workdir import completed_steps
from posttrain_jax.run.checkpoint import Checkpoints, explain_file_error
from posttrain_jax.run.curves import plot_curves, read_metrics, write_panels
from posttrain_jax.run.memory import device_memory, statement
from posttrain_jax.run.metrics import (
    Accumulator,
    MetricsWriter,
    append_line,
    as_json,
    peak_flops,
    to_host,
    truncate_after,
)
from posttrain_jax.run.options import CheckpointOptions, EvalOptions, LogOptions, profiled_steps
from posttrain_jax.run.preemption import PreemptionHandler
from posttrain_jax.run.progress import progress_line
from posttrain_jax.run.samples_page import write_page

EXACT_METRICS = ("train/lr", "train/skipped", "train/skipped_in_row")
MEASURED_BY = (
    ("data", "eval"),
    ("eval", "weights"),
    ("eval", "temperature"),
)  # keys of what an evaluation gives
SECONDS = "train/seconds_"  # so begin metrics that no two runs have alike; they are logged and not kept


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """When things happen; `config` is the resolved config, for W&B and the checkpoints."""

    log: LogOptions
    eval: EvalOptions
    checkpoint: CheckpointOptions
    max_skipped: int
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended: "complete", "preempted" or "stopped" (and why), at which step, with which last metrics."""

    status: str
    final_step: int
    metrics: dict[str, float]
    reason: str = ""


@dataclasses.dataclass
class _Pending:
    """A dispatched step whose metrics were not read yet."""

    step: int
    metrics: Metrics
    row_ids: list[str]


class _Run:
    """The moving parts of one run: what was dispatched, what was counted, where it is written."""

    def __init__(
        self,
        task: Task,
        options: LoopOptions,
        workdir: Path,
        start: int,
        meta: dict[str, Any],
        *,
        skipped: float,
    ):
        self.task = task
        self.options = options
        self.workdir = workdir
        # A run that starts from the beginning evaluates before its first step, so even line 0 goes.
        last_kept = start or -1
        self.writer = MetricsWriter(
            workdir,
            last_kept=last_kept,
            tensorboard=options.log.tensorboard,
            wandb_project=options.log.wandb_project,
            config=options.config,
        )
        if self.writer.active:
            truncate_after(workdir / "samples.jsonl", last_kept)
        number = jax.process_index()  # every process has rows of its own
        self.skipped_file = workdir / (f"skipped-{number}.jsonl" if number else "skipped.jsonl")
        truncate_after(self.skipped_file, last_kept)
        self.accumulator = Accumulator(meta.get("accumulator"))
        self.last: dict[str, float] = dict(meta.get("last", {}))
        # What an earlier start measured in another way, or stopped by another rule, does not count any more.
        before = meta.get("config", {})
        same = _sections(before, MEASURED_BY) == _sections(options.config, MEASURED_BY)
        self.best: dict[str, float] = dict(meta.get("best", {})) if same else {}
        self.stopped: str = (
            meta.get("stopped", "") if before.get("stop") == options.config.get("stop") else ""
        )
        self.skipped = skipped
        self.pending: collections.deque[_Pending] = collections.deque()
        self.started = time.time()
        self.start_step = start
        self.window_started = time.perf_counter()
        self.window_tokens = 0.0
        self.window_first = start + 1
        self.windows: collections.deque[tuple[float, float, int]] = collections.deque()
        self.first_profiled, self.last_profiled = profiled_steps(options.log.profile)
        self.profiling = False

    def start_profile(self, step: int) -> None:
        """Begins the trace when `step` is the first of the window (or the first of a run resumed inside it)."""
        inside = self.first_profiled <= step <= self.last_profiled
        if inside and not self.profiling:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True

    def stop_profile(self, state: TrainState, step: int, *, last: bool) -> None:
        """Writes the trace after the last step of the window, or of the run."""
        if not self.profiling or (step < self.last_profiled and not last):
            return
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self.profiling = False
        log_on_host0(f"Profile up to step {step}: {self.workdir / 'profile'} (open it with XProf).")

    def read_one(self) -> None:
        """Waits for the oldest dispatched step and does what its metrics call for."""
        item = self.pending.popleft()
        metrics = to_host(item.metrics)
        self._guard(item, metrics)
        self.window_tokens += float(metrics["train/tokens"].sum)
        # Of a skipped step nothing is averaged; an iteration of several updates is, for its skipped ones count nothing.
        if not float(metrics["train/skipped_in_row"].sum) or all(
            _finite(float(metric.sum)) for metric in metrics.values()
        ):
            self.accumulator.add({name: m for name, m in metrics.items() if name not in EXACT_METRICS})
        if item.step % self.options.log.every and item.step != self.task.steps:
            return
        now = time.perf_counter()
        seconds = max(now - self.window_started, 1e-9)
        values = self.accumulator.flush()
        values.update({name: float(metrics[name].sum) for name in EXACT_METRICS if name in metrics})
        timings = {name: values.pop(name) for name in list(values) if name.startswith(SECONDS)}
        self.last.update(values)
        speed = {**self._speed(item.step, seconds), **timings}
        self.writer.write(item.step, {**values, **speed})
        steps_done = item.step - self.start_step
        eta = (time.time() - self.started) / max(steps_done, 1) * (self.task.steps - item.step)
        log_on_host0(progress_line(item.step, self.task.steps, self.task.progress, {**values, **speed}, eta))
        self.reset_window(item.step)
        self._check_stop_rules(values, item.step)

    def _check_stop_rules(self, values: dict[str, float], step: int) -> None:
        """Whether the run should end here, before its last step."""
        if self.task.stop is not None and not self.stopped and step < self.task.steps:
            self.stopped = self.task.stop(values, self.best)

    def reset_window(self, step: int) -> None:
        self.window_started = time.perf_counter()
        self.window_tokens = 0.0
        self.window_first = step + 1

    def _speed(self, step: int, seconds: float) -> dict[str, float]:
        # Steps of milliseconds end in pairs: one that is ready when it is read took no time. So a rate is that of at
        # least a second, over earlier windows too.
        self.windows.append((self.window_tokens, seconds, max(step - self.window_first + 1, 1)))
        while sum(seconds for _, seconds, _ in list(self.windows)[1:]) >= 1.0:
            self.windows.popleft()
        tokens, seconds, steps = (sum(part) for part in zip(*self.windows, strict=True))
        tokens_per_second = tokens / seconds
        speed = {
            "train/tokens_per_second": tokens_per_second,
            "train/seconds_per_step": seconds / steps,
        }
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is not None and self.task.flops_per_token:
            speed["train/mfu"] = tokens_per_second * self.task.flops_per_token / (peak * jax.device_count())
        return speed

    def _guard(self, item: _Pending, metrics: dict[str, Metric]) -> None:
        in_row = int(metrics["train/skipped_in_row"].sum)
        skipped = float(metrics["train/skipped"].sum)
        more, self.skipped = skipped - self.skipped, skipped
        if in_row == 0:
            if more > 0:
                what = f"{more:.0f} of its updates were not finite, and were skipped"
                log_on_host0(f"step {item.step}: {what}.")
                append_line(self.skipped_file, {"step": item.step, "what": what, "rows": item.row_ids})
            return
        loss = float(metrics["train/loss"].sum)
        norm = float(metrics["train/grad_norm"].sum)
        name, value = ("train/loss", loss) if not _finite(loss) else ("train/grad_norm", norm)
        rows = "; ".join(item.row_ids[:8]) + (" ..." if len(item.row_ids) > 8 else "")
        what = (
            f"{name} is {value}"
            if not _finite(value)
            else "the loss or gradient of its last update is not finite"
        )
        log_on_host0(f"step {item.step}: {what}; this update was skipped ({in_row} in a row). Rows: {rows}")
        append_line(self.skipped_file, {"step": item.step, "what": what, "rows": item.row_ids})
        if in_row >= self.options.max_skipped:
            raise InputError(
                f"At step {item.step} {what}, and {in_row} updates in a row were not finite (the limit "
                f"is train.max_skipped); the rows of this batch are: {rows} (all of them in {self.skipped_file.name}). "
                "Lower optim.lr, or look at these rows."
            )

    def drain(self) -> None:
        while self.pending:
            self.read_one()

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Held-out metrics (returned) and the samples of fixed prompts, written under `step`.

        Raises:
          InputError: `checkpoint.best_metric` is not among the metrics.
        """
        if self.options.eval.weights == "ema":
            state = dataclasses.replace(state, params=state.ema)
        values = self.task.evaluate(state) if self.task.evaluate is not None else {}
        best = self.options.checkpoint.best_metric
        if best and best not in values:
            have = f"one of {', '.join(values)}" if values else "nothing, for data.eval is not set"
            raise InputError(f"checkpoint.best_metric is {best!r}, but the evaluation gives {have}.")
        samples = self.task.sample(state) if self.task.sample is not None else []
        if values:
            self.last.update(values)
            self.best.update({name: max(value, self.best.get(name, value)) for name, value in values.items()})
            self._check_stop_rules(values, step)
            self.writer.write(step, values)
            log_on_host0(
                f"evaluation at step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items())
            )
        if self.writer.active and samples:
            for row in samples:
                append_line(self.workdir / "samples.jsonl", {"step": step, **row})
            write_page(self.workdir / "samples.jsonl", self.workdir / "samples.html")
            self.writer.write_samples(step, samples)
        self.reset_window(step)
        return values

    def meta(self, git_hash: str, collector: CollectorState) -> dict[str, Any]:
        """What a checkpoint needs besides arrays, as JSON."""
        return {
            "rows": collector.values,
            "accumulator": self.accumulator.state(),
            "last": self.last,
            "best": self.best,
            "stopped": self.stopped,
            "git": git_hash,
            "config": self.options.config,
        }


def train(task: Task, options: LoopOptions, workdir: Path) -> Summary:
    """Trains to the last step, or until SIGTERM, SIGHUP or Ctrl-C; resumes from the newest good checkpoint, if any.

    Raises:
      InputError: too many non-finite updates in a row, a file that cannot be written, a checkpoint that does not fit.
    """
    preemption = PreemptionHandler()
    try:
        kept = options.checkpoint
        checkpoints = Checkpoints(
            workdir, keep=kept.keep, best_metric=kept.best_metric, best_is_high=kept.best_is_high
        )
        try:
            return _train(task, options, workdir, checkpoints, preemption)
        finally:
            checkpoints.abandon()
    except InputError:
        raise
    except Exception as error:
        explained = explain_file_error(workdir, error)
        if explained is None:
            raise
        raise explained from error
    finally:
        preemption.close()
        task.collector.close()


def _train(
    task: Task, options: LoopOptions, workdir: Path, checkpoints: Checkpoints, preemption: PreemptionHandler
) -> Summary:
    for line in statement(task.abstract_state, task.memory, device_memory()):
        log_on_host0(line)
    if completed_steps(workdir):
        checkpoints.rewrite_damaged_frozen(task.abstract_state.frozen, lambda: task.init_state().frozen)
    restored = checkpoints.restore(task.abstract_state)
    if restored is None:
        state, start, meta = task.init_state(), 0, {}
        checkpoints.remove_stale_frozen()
        checkpoints.save_frozen(state.frozen)
    else:
        state, start, meta = restored.state, restored.step, restored.meta
        task.collector.set_state(CollectorState(meta["rows"], restored.arrays))
        log_on_host0(f"Resuming from step {start} ({checkpoints.folder / str(start)}).")

    if state.ema:
        which = "moving average" if options.eval.weights == "ema" else "last weights"
        log_on_host0(
            f"Evaluations, samples and the best checkpoint look at the {which} (eval.weights={options.eval.weights})."
        )
    git_hash = _git_hash()
    run = _Run(task, options, workdir, start, meta, skipped=float(state.skipped))
    status = "complete"
    if run.writer.active:
        write_panels(workdir, task.panels)
    if start == 0:
        run.evaluate(state, 0)
    step = saved = start
    try:
        while step < task.steps and not run.stopped:
            before = task.collector.get_state()
            run.start_profile(step + 1)
            try:
                collected = task.collector.next(state)
            except StepNotTaken:
                if step > saved:
                    run.drain()
                    run.writer.sync()
                    checkpoints.save(state, run.meta(git_hash, before), {}, before.arrays)
                    checkpoints.close()
                raise
            # A step's arguments lie on the devices, and `to_host` fetches its metrics: no other transfer may wait here.
            with jax.transfer_guard("disallow"):
                state, metrics = task.train_step(state, collected.batch)
            step += 1
            run.pending.append(_Pending(step, {**collected.metrics, **metrics}, collected.row_ids))
            if len(run.pending) > task.ahead:
                run.read_one()
            stop = preemption.stop_after(step)
            last = step == task.steps or bool(run.stopped)
            run.stop_profile(state, step, last=last or stop)
            if last and task.finish is not None:
                run.drain()
                state = task.finish(state)
            evaluated: dict[str, float] = {}
            kept = bool(options.checkpoint.every and step % options.checkpoint.every == 0)
            measured = options.eval.every and step % options.eval.every == 0
            if last or measured or (kept and options.checkpoint.best_metric):
                run.drain()
                evaluated = run.evaluate(state, step)
            last = last or bool(run.stopped)
            if last or stop or kept:
                run.drain()
                run.writer.sync()
                after = task.collector.get_state()
                checkpoints.save(state, run.meta(git_hash, after), evaluated, after.arrays)
                saved = step
            if stop and not last:
                status = "preempted"
                break
        run.drain()
        checkpoints.close()
    finally:
        run.writer.close()
    if run.stopped:
        status = "stopped"
        log_on_host0(f"Stopped at step {step} of {task.steps}: {run.stopped}.")
    summary = Summary(status=status, final_step=step, metrics=run.last, reason=run.stopped)
    if jax.process_index() == 0:
        if (workdir / "metrics.jsonl").is_file():
            logged = read_metrics(workdir / "metrics.jsonl")
            plot_curves({workdir.name: logged}, task.panels, workdir / "curves.png")
        _write_json(workdir / "summary.json", {**dataclasses.asdict(summary), "metrics": as_json(run.last)})
    log_on_host0(f"{status} at step {step}: {workdir}")
    return summary


def _sections(config: dict[str, Any], keys: tuple[tuple[str, str], ...]) -> list[Any]:
    return [config.get(section, {}).get(key) for section, key in keys]


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _git_hash() -> str:
    """The commit of this code, "+" appended when the tree has changes; "unknown" outside a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
