"""Log-probabilities of completions under a frozen reference model, computed once and kept on disk.

DPO and its family compare the policy with the model it started from. That model does not change, so its
log-probability of every completion is computed before the first step, in the rows that training uses, and read again by
the next run on
the same model and data: no second model in memory, no second forward pass in a step. A run keeps its own copy, so that
it resumes with the same bits when the cache was emptied or JAX is another version.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from posttrain_jax.core.cache import cache_root
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.trees import fingerprint
from posttrain_jax.core.types import PyTree
from posttrain_jax.data.preference_groups import PreferenceSource
from posttrain_jax.data.preference_rows import RowShape
from posttrain_jax.forward.completions import map_completions, policy_logps_of
from posttrain_jax.models.transformer import Model

log = logging.getLogger(__name__)

FORMAT_VERSION = 4


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
    in_order: bool = False,
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
      in_order: see `map_completions`. What bfloat16 gives depends on the place in a row (by tenths of a nat), so of
        held-out rows it is computed in the rows that they are evaluated in.

    Returns:
      For each source float32 `[S, 2]` (S sequences of its store; those of groups that are not in the source's index
      are 0): of all trained tokens, and of the last one alone.
    """
    root = folder if folder is not None else cache_root() / "reference_logps"
    identity = fingerprint(params)
    results = []
    for source in sources:
        index = hashlib.sha256(np.ascontiguousarray(source.index, np.int64).tobytes()).hexdigest()
        layout = [groups, micro_batches] if in_order else []
        name = _digest(FORMAT_VERSION, model, identity, index, shape, source.store.meta["sha256"], *layout)
        own = workdir / "reference_logps" / f"{name}.npz"
        shared = root / f"{_digest(name, jax.__version__, jax.default_backend())}.npz"
        kept = _read(own, len(source.store.lines))
        logps = _read(shared, len(source.store.lines)) if kept is None else kept
        if not _everywhere(logps is not None) or logps is None:
            log_on_host0(
                f"Reference log-probabilities of {len(source):,} prompts are computed once and kept in {shared}."
            )
            of_rows = policy_logps_of(model, shape.share_prompt)
            logps = map_completions(
                of_rows,
                params,
                source,
                shape,
                mesh,
                groups=groups,
                micro_batches=micro_batches,
                in_order=in_order,
            )
            _require_finite(logps, source)
            _write(shared, logps)
        if logps is not kept:
            _write(own, logps)
        results.append(logps)
    return results


def _digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:32]


def _everywhere(is_cached: bool) -> bool:
    """Whether every process has it in the cache; they compute together or not at all."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(is_cached))))


def _require_finite(logps: np.ndarray, source: PreferenceSource) -> None:
    wrong = np.flatnonzero(~np.isfinite(logps).all(axis=1))
    if len(wrong):
        store = source.store
        where = f"{store.meta['files'][store.files[wrong[0]]]}:{store.lines[wrong[0]]}"
        raise InputError(
            f"The reference's log-probability of {len(wrong):,} completions is no finite number, first of {where}; "
            "are the weights of model.init whole, or is model.dtype too small for them?"
        )


def _read(path: Path, sequences: int) -> np.ndarray | None:
    """What `_write` wrote; None where it is not there, or (with a warning) is not that any more."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            logps, digest = file["logps"], str(file["sha256"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, TypeError):
        logps, digest = np.zeros(0, np.float32), ""
    if logps.shape == (sequences, 2) and logps.dtype == np.float32 and _sha256(logps) == digest:
        return logps
    log.warning(
        "The reference log-probabilities in %s are not as they were written; they are computed again.", path
    )
    return None


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        np.savez(file, logps=values, sha256=_sha256(values))
    os.replace(file.name, path)
