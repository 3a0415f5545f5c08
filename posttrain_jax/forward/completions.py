"""A model's log-probability or reward of every completion of a data set."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from posttrain_jax.core.sharding import batch_sharding, host_data_shards, jit_step, put_batch, replicated
from posttrain_jax.core.types import Array, PreferenceBatch, PyTree
from posttrain_jax.core.updates import map_micro_batches, used_micro_batches
from posttrain_jax.data.preference_groups import PreferenceSource
from posttrain_jax.data.preference_rows import PreferenceRows, RowShape
from posttrain_jax.forward.heads import completion_logps
from posttrain_jax.losses.logprobs import Projection
from posttrain_jax.models.reward_head import scores
from posttrain_jax.models.transformer import Model, head_VD

# (parameters, rows `[B, ...]`) -> `[B, N, ...]`
OfRows = Callable[[PyTree, PreferenceBatch], Array]


def hidden_states(params: PyTree, batch: PreferenceBatch, *, model: Model, share_prompt: bool) -> Array:
    """Final hidden states of rows of preferences, `[B, T, D]`."""
    output = model.apply(
        params,
        batch.tokens,
        segment_ids_BT=batch.segment_ids,
        positions_BT=batch.positions,
        branches_BT=batch.branches if share_prompt else None,
        logits=False,
    )
    return output.hidden_BTD


def policy_logps(params: PyTree, batch: PreferenceBatch, *, model: Model, share_prompt: bool) -> Array:
    """Log-probability of every completion, `[B, N, 2]`: of all its trained tokens, and of its last one alone."""
    hidden_BTD = hidden_states(params, batch, model=model, share_prompt=share_prompt)
    projection = Projection(softcap=model.config.logits_softcap)
    logps = completion_logps(hidden_BTD, head_VD(params), batch, projection)
    return jnp.stack([logps.sums_BN, logps.end_BN], axis=-1)


def decided_weights(batch: PreferenceBatch) -> Array:
    """The comparisons' weights `[B, P]`, 0 where the soft label is 1/2: neither completion was preferred."""
    return jnp.where(batch.probabilities == 0.5, 0.0, batch.weights)


def reward_scores(params: PyTree, batch: PreferenceBatch, *, model: Model, share_prompt: bool) -> Array:
    """Reward of every completion, `[B, N]`; undefined in unused entries."""
    hidden_BTD = hidden_states(params, batch, model=model, share_prompt=share_prompt)
    return scores(params["score_head"], hidden_BTD, batch.last_token_index)


@functools.lru_cache(maxsize=4)
def policy_logps_of(model: Model, share_prompt: bool) -> OfRows:
    """`policy_logps` for `map_completions`: the same object for the same model."""
    return functools.partial(policy_logps, model=model, share_prompt=share_prompt)


@functools.lru_cache(maxsize=4)
def reward_scores_of(model: Model, share_prompt: bool) -> OfRows:
    """`reward_scores` for `map_completions`: the same object for the same model."""
    return functools.partial(reward_scores, model=model, share_prompt=share_prompt)


def map_completions(
    of_rows: OfRows,
    params: PyTree,
    source: PreferenceSource,
    shape: RowShape,
    mesh: Mesh,
    *,
    groups: int,
    micro_batches: int,
    in_order: bool = False,
) -> np.ndarray:
    """`of_rows` of every completion of a source, float32 `[S, ...]` for the S sequences of its store.

    Completions of groups that are not in the source's index stay 0. Every process gets all values. Calls with the same
    `of_rows` (the same object) and shapes compile once.

    Args:
      of_rows: computes the values of a batch of rows.
      params: on `mesh`.
      source: its groups are taken longest first, which leaves the fewest rows.
      shape: of the rows.
      mesh: of the devices.
      groups: how many go into one batch, over all processes.
      micro_batches: how many micro-batches the rows of a batch are split into.
      in_order: take the groups in the source's order, so that the rows are those of `eval_batches`.
    """
    index, count = host_data_shards(mesh)
    rows = PreferenceRows(source, shape)
    step = _jitted(of_rows, mesh)
    order = np.argsort(-source.needs(share_prompt=shape.share_prompt), kind="stable")
    order = np.arange(len(source)) if in_order else order
    out: np.ndarray | None = None
    for first in range(0, len(order), groups):
        numbers = range(first + index, first + groups, count)
        taken = [rows[int(order[n])] if n < len(order) else None for n in numbers]
        batch = put_batch(rows.collate(taken), mesh, micro_batches, PreferenceBatch)
        values, ids = (np.asarray(leaf) for leaf in step(params, batch))
        if out is None:
            out = np.zeros((len(source.store.lines), *values.shape[3:]), np.float32)
        out[ids[ids != 0] - 1] = values[ids != 0]
    assert out is not None  # a source has at least one group
    return out


@functools.lru_cache(maxsize=4)
def _jitted(of_rows: OfRows, mesh: Mesh) -> Callable[[PyTree, PreferenceBatch], tuple[Array, Array]]:
    return jit_step(
        functools.partial(_of_step, of_rows=of_rows),
        mesh,
        in_shardings=(None, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def _of_step(params: PyTree, batch: PreferenceBatch, *, of_rows: OfRows) -> tuple[Array, Array]:
    used = used_micro_batches(batch.segment_ids)
    return map_micro_batches(functools.partial(of_rows, params), batch, used), batch.sequence_ids
