"""Log-probabilities of given tokens summed over sequences: what held-out loss and multiple choice share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.score import token_scores


def sequence_sums(
    model: Model,
    params: PyTree,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    mesh: Mesh | None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Sums over the tokens with loss mask 1 of every sequence of the batches, in order.

    Args:
      model, params, mesh: as `token_scores`.
      batches: the leaves of a `Batch`, `[B, T]`; segments of a row are numbered 1, 2 ... from left to right.
      progress: called with the batches done.

    Returns:
      float64 `[S, 4]`: negative log-probability (nats), tokens with loss mask 1, at how many of them the token is
      the model's likeliest, all tokens.
    """
    parts: list[np.ndarray] = []
    # One batch runs on the device while the one before is summed up here.
    waiting: tuple[Any, dict[str, np.ndarray]] | None = None
    for done, arrays in enumerate(batches, 1):
        running = (token_scores(model, params, arrays, mesh=mesh), arrays)
        if waiting is not None:
            parts.append(_sums_of_batch(*waiting))
        waiting = running
        if progress is not None:
            progress(done)
    if waiting is not None:
        parts.append(_sums_of_batch(*waiting))
    return np.concatenate(parts) if parts else np.zeros((0, 4))


def _sums_of_batch(scores: tuple[Array, Array], arrays: dict[str, np.ndarray]) -> np.ndarray:
    logps_BT, is_argmax_BT = (np.asarray(part, np.float64) for part in scores)
    segments_BT = arrays["segment_ids"]
    scored_BT = np.zeros(segments_BT.shape)
    scored_BT[:, :-1] = arrays["loss_mask"][:, 1:] != 0
    sums = []
    for logps, correct, scored, segments in zip(logps_BT, is_argmax_BT, scored_BT, segments_BT, strict=True):
        columns = (-logps * scored, scored, correct * scored, np.ones(len(segments)))
        last = int(segments.max())
        by_segment = [np.bincount(segments, weights=column, minlength=last + 1) for column in columns]
        sums.append(np.stack(by_segment, axis=1)[1:])
    return np.concatenate(sums)
