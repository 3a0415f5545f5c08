"""Reads the parameters alone out of a workdir's checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import combine, leaf_paths
from posttrain_jax.core.types import PyTree
from posttrain_jax.core.workdir import completed_steps, damage, frozen_damage

log = logging.getLogger(__name__)


def saved_parameters(workdir: Path, *, step: int | None = None) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter that a workdir holds, trained and frozen; {} where that cannot be read.

    Args:
      step: which checkpoint; None = the newest that can be read (all of a run hold the same parameters).
    """
    steps = completed_steps(workdir) if step is None else [step]
    # Where the newest checkpoint is damaged, those before it hold the same parameters.
    shapes_by_step = (
        saved_shapes(workdir / "checkpoints" / str(number) / "params") for number in reversed(steps)
    )
    trained = next((shapes for shapes in shapes_by_step if shapes), {})
    if not trained:
        return {}
    frozen = saved_shapes(workdir / "frozen") if (workdir / "frozen").is_dir() else None
    return {**(frozen or {}), **trained}


def restore_params(
    workdir: Path,
    abstract_params: PyTree,
    *,
    step: int | None = None,
    shardings: PyTree = None,
    ema: bool = False,
) -> tuple[PyTree, int]:
    """The parameters of a workdir alone, trained and frozen joined: (params, step).

    Args:
      workdir: the run's folder.
      abstract_params: the whole tree's shapes (LoRA leaves included), as `Model.abstract_params` gives them.
      step: which checkpoint; None = the newest that is not damaged.
      shardings: where each leaf goes (same tree); None = the default device.
      ema: the moving average instead of the last parameters.

    Raises:
      InputError: no such checkpoint, or it is damaged; a run that kept no average.
    """
    steps = completed_steps(workdir)
    if step is not None and step not in steps:
        raise InputError(f"{workdir} has no checkpoint of step {step}; it has {steps or 'none'}.")
    for candidate in [step] if step is not None else reversed(steps):
        step_dir = workdir / "checkpoints" / str(candidate)
        problem = damage(step_dir)
        if problem is None:
            return _read_params(workdir, step_dir, abstract_params, shardings, ema), candidate
        log.error("Checkpoint %s is damaged: %s.", step_dir, problem)
    raise InputError(f"{workdir} has no checkpoint that can be read (found steps: {steps or 'none'}).")


def _read_params(
    workdir: Path, step_dir: Path, abstract_params: PyTree, shardings: PyTree, ema: bool
) -> PyTree:
    if shardings is None:
        shardings = jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract_params
        )
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params,
        shardings,
    )
    saved = saved_shapes(step_dir / "params")
    if saved is None:
        raise InputError(
            f"What the checkpoint {step_dir} holds cannot be read; was it written by another version of Orbax?"
        )
    frozen_dir = workdir / "frozen"

    def subset(tree: dict, names: set[str], prefix: str = "") -> dict:
        out = {}
        for name, child in tree.items():
            path = prefix + name
            part = subset(child, names, path + "/") if isinstance(child, dict) else child
            if (isinstance(child, dict) and part) or path in names:
                out[name] = part
        return out

    trained_like = subset(like, set(saved))
    # A run with a value network saves that too; it is not the model's.
    unknown = [path for path in sorted(set(saved) - set(leaf_paths(like))) if not path.startswith("value/")]
    if unknown:
        raise InputError(
            f"{step_dir} holds parameters that the model does not have ({unknown[0]}); model/config.json or "
            "config.json of this workdir is not that of its checkpoints."
        )
    problem = frozen_damage(workdir) if frozen_dir.is_dir() else None
    if problem is not None:
        raise InputError(f"{frozen_dir} is damaged: {problem}; run the training command again to repair it.")
    if ema:
        averaged = saved_shapes(step_dir / "optimizer") or {}
        if not all(f"ema/{path}" in averaged for path in leaf_paths(trained_like)):
            raise InputError(
                f"{step_dir} holds no moving average of the weights (optim.ema was 0, off); take the last weights."
            )
        trained = _restore_some((step_dir / "optimizer").absolute(), {"ema": trained_like})["ema"]
    else:
        trained = _restore_some((step_dir / "params").absolute(), trained_like)
    frozen_like = subset(like, set(leaf_paths(like)) - set(saved))
    if not frozen_like or not frozen_dir.is_dir():
        return trained
    return combine(trained, _restore_some(frozen_dir.absolute(), frozen_like))


def _restore_some(folder: Path, like: PyTree) -> PyTree:
    """Reads the leaves of `like` and nothing else (not PPO's value network, nor the optimizer's moments)."""
    arguments = ocp.args.PyTreeRestore(
        item=like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder, args=arguments)


def saved_shapes(item_dir: Path) -> dict[str, tuple[int, ...]] | None:
    """Path -> shape of every array that an item of a checkpoint holds; None where its metadata cannot be read."""
    try:
        with ocp.StandardCheckpointer() as reader:
            tree = reader.metadata(item_dir.absolute()).item_metadata.tree
    except Exception:
        return None
    paths = leaf_paths(jax.tree.map(lambda leaf: np.zeros(()), tree, is_leaf=_is_array_metadata))
    leaves = jax.tree.leaves(tree, is_leaf=_is_array_metadata)
    # An optimizer without moments has None in their place.
    return {path: tuple(leaf.shape) for path, leaf in zip(paths, leaves, strict=True) if leaf is not None}


def _is_array_metadata(node: Any) -> bool:
    return not isinstance(node, dict | list | tuple)
