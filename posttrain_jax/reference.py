"""Log-probabilities of completions under a frozen reference model, computed once and kept on disk.

DPO and its family compare the policy with the model it started from. That model does not change, so what it says of
every completion is computed before the first step, in the rows that training uses, and found again by the next run on
the same model and data: no second model in memory, no second forward pass in a step. A run keeps its own copy, so that
it resumes with the same bits when the cache was emptied or JAX is another version.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from posttrain_jax.assets import cache_root
from posttrain_jax.completions import map_completions, policy_logps_of
from posttrain_jax.data.preference_rows import RowShape
from posttrain_jax.data.tokenized_preferences import PreferenceSource
from posttrain_jax.metrics import say
from posttrain_jax.models.transformer import Model
from posttrain_jax.trees import fingerprint
from posttrain_jax.types import PyTree

FORMAT_VERSION = 2


def reference_logps(
    model: Model,
    params: PyTree,
    sources: Sequence[PreferenceSource],
    shape: RowShape,
    mesh: Mesh,
    *,
    groups: int,
    micro_batches: int,
    workdir: Path,
    folder: Path | None = None,
) -> list[np.ndarray]:
    """What the reference says of every completion of some sources, from the cache where it is there.

    Args:
      model, params: the reference.
      sources: their groups.
      shape: of the rows, as training packs them.
      mesh: where `params` lie.
      groups: prompts at once, over all processes.
      micro_batches: how these rows are cut.
      workdir: of the run; its copy lies in `reference_logps/` and is read first.
      folder: the cache; by default `$POSTTRAIN_CACHE` or `~/.cache/posttrain_jax`, in `reference_logps/`.

    Returns:
      For each source float32 `[S, 2]` (S sequences of its store; those of groups that are not in the source's index
      are 0): of all trained tokens, and of the last one alone.
    """
    root = folder if folder is not None else cache_root() / "reference_logps"
    identity = fingerprint(params)
    results = []
    for source in sources:
        index = hashlib.sha256(np.ascontiguousarray(source.index, np.int64).tobytes()).hexdigest()
        name = _digest(FORMAT_VERSION, model, identity, index, shape, source.store.meta["sha256"])
        own = workdir / "reference_logps" / f"{name}.npy"
        shared = root / f"{_digest(name, jax.__version__, jax.default_backend())}.npy"
        kept = _read(own, len(source.store.lines))
        found = _read(shared, len(source.store.lines)) if kept is None else kept
        if not _everywhere(found is not None) or found is None:
            say(
                f"Reference log-probabilities of {len(source):,} prompts are computed once and kept in {shared}."
            )
            logps = policy_logps_of(model, shape.share_prompt)
            found = map_completions(
                logps, params, source, shape, mesh, groups=groups, micro_batches=micro_batches
            )
            _write(shared, found)
        if found is not kept:
            _write(own, found)
        results.append(found)
    return results


def _digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:32]


def _everywhere(found: bool) -> bool:
    """Whether every process has found it; they compute together or not at all."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(found))))


def _read(path: Path, sequences: int) -> np.ndarray | None:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (sequences, 2) and found.dtype == np.float32 else None


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        np.save(file, values)
    os.replace(file.name, path)
