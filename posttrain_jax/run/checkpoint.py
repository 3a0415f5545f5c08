"""One Orbax checkpoint manager for every algorithm: save in the background, restore exactly, survive damage.

A checkpoint at step S is the folder `checkpoints/S/` with the items

    params      the trained parameters
    optimizer   optimizer state, step, RNG key data, skip counters, EMA
    collector   arrays of the collector of batches, if it has any (a replay buffer, say)
    metrics     JSON: the metric by which the best is kept, if any
    meta        JSON: the collector's position, metric sums not yet logged, git hash, and what else a resume needs

and `manifest.json` with the size and CRC-32 of every file, written just before Orbax's atomic rename makes the
folder visible under its name. Parameters that are not trained (LoRA's
base model) never change, so they are saved once, in `frozen/`, with a manifest too. A checkpoint whose files do not
match its manifest is named, skipped, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from posttrain_jax.core.checkpoint_params import saved_shapes
from posttrain_jax.core.errors import InputError, file_error
from posttrain_jax.core.trees import byte_count, leaf_paths
from posttrain_jax.core.types import PyTree, TrainState
from posttrain_jax.core.workdir import (
    COLLECTOR,
    ITEMS,
    METRICS,
    completed_steps,
    damage,
    decided_by_host0,
    frozen_damage,
    write_manifest,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state read by `Checkpoints.restore`, with its `meta` and step; `arrays` are the collector's."""

    state: TrainState
    meta: dict[str, Any]
    step: int
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one workdir, for writing. Every process of the run makes one and calls it alike."""

    def __init__(self, workdir: Path, *, keep: int = 2, best_metric: str = "", best_is_high: bool = False):
        """Opens (and makes) `workdir/checkpoints`, clearing what a killed run left half-written.

        Args:
          workdir: the run's folder.
          keep: how many of the latest checkpoints stay.
          best_metric: the checkpoint with the best value of this metric stays too ("" = off).
          best_is_high: whether higher is better.
        """
        self.workdir = workdir
        self.folder = workdir / "checkpoints"
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        worst = -math.inf if best_is_high else math.inf

        def value_of(metrics: dict[str, float]) -> float:
            # A run that was resumed with another best_metric has checkpoints without it.
            return metrics.get(best_metric, worst)

        if best_metric:
            best = preservation_policy.BestN(
                get_metric_fn=value_of,
                reverse=not best_is_high,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        self._best_metric = best_metric
        self._saving: int | None = None
        self._remove_unreadable_metrics()
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            item_names=(*ITEMS, COLLECTOR),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                # Orbax writes the metrics, so that a resumed run knows the best, only where it is given this too.
                best_fn=value_of if best_metric else None,
                best_mode="max" if best_is_high else "min",
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._finalized),
            ),
        )

    def _remove_unreadable_metrics(self) -> None:
        """Orbax would fail on them before a good checkpoint can be found; the manifest shows that they are gone."""
        for step in completed_steps(self.workdir) if jax.process_index() == 0 else ():
            folder = self.folder / str(step) / METRICS
            try:
                unreadable = folder.is_dir() and not isinstance(
                    json.loads((folder / METRICS).read_text()), dict
                )
            except (OSError, ValueError, RecursionError):
                unreadable = True
            if unreadable:
                shutil.rmtree(folder)

    def _finalized(self) -> None:
        """Called by Orbax when every item is on disk and the folder still has its temporary name."""
        if jax.process_index() == 0:
            (unfinished,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_manifest(unfinished)

    def remove_stale_frozen(self) -> None:
        """Before a run's first step: removes a `frozen/` left by a start that ended before its first checkpoint. It may
        belong to another model."""
        if jax.process_index() == 0 and (self.workdir / "frozen").is_dir():
            shutil.rmtree(self.workdir / "frozen")
        multihost_utils.sync_global_devices("stale frozen removed")

    def save_frozen(self, frozen: PyTree) -> None:
        """Saves the parameters that are not trained, once per workdir; nothing if there are none."""
        target = self.workdir / "frozen"
        if not frozen or not decided_by_host0(
            jax.process_index() == 0 and frozen_damage(self.workdir) is not None
        ):
            return
        with ocp.StandardCheckpointer() as writer:
            writer.save(target.absolute(), frozen, force=True)
            writer.wait_until_finished()
        if jax.process_index() == 0:
            write_manifest(target, (".",))

    def rewrite_damaged_frozen(self, like: PyTree, make: Callable[[], PyTree]) -> None:
        """Before a resume: if the files of the untrained parameters are damaged, makes and saves these again."""
        problem = frozen_damage(self.workdir) if like and jax.process_index() == 0 else None
        if not decided_by_host0(problem is not None):
            return
        if problem is not None:
            log.error(
                "%s is damaged: %s; it is made again from model.init.", self.workdir / "frozen", problem
            )
        self.save_frozen(make())

    def save(
        self,
        state: TrainState,
        meta: dict[str, Any],
        metrics: dict[str, float],
        arrays: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> int:
        """Starts saving; returns the step. Waits only for the copy off the devices and for the save before.

        Args:
          state: what is trained.
          meta: JSON.
          metrics: of the evaluation at this step, for `best_metric`.
          arrays: the collector's, by name; every process has the same.

        Raises:
          InputError: the disk is full; the checkpoint before is untouched.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return step
        optimizer = {
            "opt_state": state.opt_state,
            "step": state.step,
            "key": jax.random.key_data(state.key),
            "skipped": state.skipped,
            "skipped_in_row": state.skipped_in_row,
            "ema": state.ema,
        }
        # A NaN cannot be compared with the best so far.
        has_best = math.isfinite(metrics.get(self._best_metric, math.nan))
        self.wait()
        self._check_space(byte_count((state.params, state.opt_state, state.ema, dict(arrays))))
        self._saving = step
        # Which arrays there are is written too: what is not known cannot be restored.
        described = {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()}
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(optimizer),
            "meta": ocp.args.JsonSave({**meta, COLLECTOR: described}),
        }
        if arrays:
            items[COLLECTOR] = ocp.args.StandardSave(dict(arrays))
        self._manager.save(
            step,
            args=ocp.args.Composite(**items),
            metrics={self._best_metric: metrics[self._best_metric]} if has_best else None,
        )
        return step

    def _check_space(self, needed: int) -> None:
        """Refuses a save that the disk has no room for: TensorStore would print an error for each failed write."""
        free = shutil.disk_usage(self.folder).free if jax.process_index() == 0 else needed
        if decided_by_host0(free < needed):
            what = f"{free / 1e6:,.1f} MB are free and a checkpoint takes {needed / 1e6:,.1f} MB"
            raise disk_full(self.workdir, what)

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises the errors of the saving threads (see `explain_file_error`)."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save and releases the manager."""
        self.wait()
        self._manager.close()

    def abandon(self) -> None:
        """Waits for a save under way and ignores its errors: the run is over, or fails for another reason."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> Restored | None:
        """The newest undamaged checkpoint, sharded like `like` (arrays or shapes with shardings); None without one.

        Restoring onto another mesh or number of devices than it was saved from is allowed.

        Raises:
          InputError: the parameters on disk are not those of `like`, or no checkpoint can be read.
        """
        steps = completed_steps(self.workdir)
        for step in reversed(steps):
            problem = damage(self.folder / str(step)) if jax.process_index() == 0 else None
            if decided_by_host0(problem is not None):
                if problem is not None:
                    log.error(
                        "Checkpoint %s is damaged: %s; the one before is used.",
                        self.folder / str(step),
                        problem,
                    )
                self._rename_damaged(step)
                continue
            return self._read(step, like)
        if steps:
            raise InputError(
                f"None of the checkpoints {steps} in {self.folder} can be read; they were renamed to *.damaged. "
                "Restore one from a backup, or run the same command again to start from the beginning."
            )
        return None

    def _rename_damaged(self, step: int) -> None:
        multihost_utils.sync_global_devices("damaged")
        if jax.process_index() == 0:
            target = self.folder / f"{step}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)
        multihost_utils.sync_global_devices("set aside")
        self._manager.reload()

    def _read(self, step: int, like: TrainState) -> Restored:
        key_data = jax.eval_shape(jax.random.key_data, like.key)
        key_data = jax.ShapeDtypeStruct(key_data.shape, key_data.dtype, sharding=like.step.sharding)
        optimizer = {
            "opt_state": like.opt_state,
            "step": like.step,
            "key": key_data,
            "skipped": like.skipped,
            "skipped_in_row": like.skipped_in_row,
            "ema": like.ema,
        }
        self._check_shapes(step, like.params)
        try:
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(_abstract(like.params)),
                    optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
                    meta=ocp.args.JsonRestore(),
                ),
            )
            arrays = self._read_arrays(step, items.meta.get(COLLECTOR, {}))
        except Exception as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"Checkpoint {self.folder / str(step)} cannot be read, although its files are what was written: "
                f"{first_line.rstrip('.')}. Nothing was changed; is there enough memory, and is the file system up?"
            ) from error
        saved = items.optimizer
        state = TrainState(
            step=saved["step"],
            params=items.params,
            frozen=self._read_frozen(like.frozen),
            opt_state=saved["opt_state"],
            ema=saved["ema"],
            key=jax.random.wrap_key_data(saved["key"]),
            skipped=saved["skipped"],
            skipped_in_row=saved["skipped_in_row"],
        )
        return Restored(state=state, meta=items.meta, step=step, arrays=arrays)

    def _read_arrays(self, step: int, described: dict[str, Any]) -> dict[str, np.ndarray]:
        """The collector's arrays, as the checkpoint's meta describes them."""
        if not described:
            return {}
        like = {name: np.zeros(shape, dtype) for name, (shape, dtype) in described.items()}
        items = self._manager.restore(
            step, args=ocp.args.Composite(**{COLLECTOR: ocp.args.StandardRestore(like)})
        )
        return {name: np.asarray(array) for name, array in items[COLLECTOR].items()}

    def _read_frozen(self, like: PyTree) -> PyTree:
        if not like:
            return like
        with ocp.StandardCheckpointer() as reader:
            return reader.restore((self.workdir / "frozen").absolute(), _abstract(like))

    def _check_shapes(self, step: int, like: PyTree) -> None:
        saved = saved_shapes(self.folder / str(step) / "params")
        if saved is None:
            return
        expected = dict(zip(leaf_paths(like), [leaf.shape for leaf in jax.tree.leaves(like)], strict=True))
        mismatched = sorted(
            path for path in expected.keys() | saved.keys() if expected.get(path) != saved.get(path)
        )
        if mismatched:
            path = mismatched[0]
            raise InputError(
                f"Checkpoint {self.folder / str(step)} does not fit this config: {path} is "
                f"{saved.get(path, 'absent')} on disk and {expected.get(path, 'absent')} in the model "
                f"({len(mismatched)} such parameters); use the config that the run was started with, or a new "
                "--workdir."
            )


def explain_file_error(workdir: Path, error: Exception) -> InputError | None:
    """An exception of a run as an `InputError` that says what to do, if a file system caused it; else None."""
    cause = file_error(error)
    if cause is None:
        return None
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(workdir, "a file could not be written")
    file = cause.filename2 or cause.filename  # a rename has two names; the second is the new one
    where = f": {file}" if file else ""
    return InputError(
        f"The run in {workdir} met a file error ({cause.strerror}{where}); {_newest_checkpoint(workdir)}. Put that "
        "right, and run the same command again."
    )


def disk_full(workdir: Path, what: str) -> InputError:
    """The error of a full disk; `what` says what did not fit."""
    return InputError(
        f"The disk of {workdir} is full ({what}); {_newest_checkpoint(workdir)}. Free some space and run the same "
        "command again."
    )


def _newest_checkpoint(workdir: Path) -> str:
    try:
        steps = completed_steps(workdir)
    except OSError:
        steps = []
    return f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
