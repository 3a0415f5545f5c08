"""Supervised fine-tuning: raise the log-probability of the assistant's tokens, and of nothing else.

The step, from top to bottom: rows of tokens -> hidden states -> log-probabilities of the trained tokens alone
(`forward/heads.py`) -> sum of the negative log-likelihoods -> gradient sums over micro-batches -> one division by
the global count of trained tokens -> clip, optimizer, EMA, unless something is not finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.algorithms.contract import Steps, TextAlgorithm
from posttrain_jax.core.masking import shift_left
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import Array, Batch, Metric, Metrics, Panel, ProgressField, PyTree, TrainState
from posttrain_jax.core.updates import eval_sums, padding_metrics, update
from posttrain_jax.data.loader import RowSource
from posttrain_jax.forward.heads import sum_logps
from posttrain_jax.losses.logprobs import Projection
from posttrain_jax.losses.sft import nll_loss
from posttrain_jax.models.spec import init_state
from posttrain_jax.models.transformer import Model, head_VD
from posttrain_jax.run import curves, progress

PROGRESS = (
    ProgressField("loss {:.4f}", ("train/loss",)),
    ProgressField("token accuracy {:.1%}", ("train/token_accuracy",)),
    *progress.RATES,
)
PANELS = (
    Panel("loss (nats per trained token)", ("train/loss", "eval/loss")),
    Panel("token accuracy (share of trained tokens)", ("train/token_accuracy", "eval/token_accuracy")),
    *curves.TRAINING,
)


def token_losses(params: PyTree, batch: Batch, *, model: Model) -> tuple[Array, Array, Metrics]:
    """Sum of the losses over trained tokens (differentiable), their log-probabilities `[B, T]`, and metrics.

    The target of place t is the token at t + 1; its mask travels with it.
    """
    output = model.apply(
        params,
        batch.tokens,
        segment_ids_BT=batch.segment_ids,
        positions_BT=batch.positions,
        logits=False,
    )
    targets_BT = shift_left(batch.tokens)
    mask_BT = shift_left(batch.loss_mask)
    projection = Projection(softcap=model.config.logits_softcap)
    total, logps_BT, is_argmax_BT = sum_logps(
        output.hidden_BTD, head_VD(params), targets_BT, mask_BT, projection
    )
    loss = nll_loss(logps_BT, mask_BT)
    metrics = {
        "loss": Metric(loss.metrics["loss"].sum, loss.count),
        "token_accuracy": Metric(jnp.sum(is_argmax_BT), loss.count),
        "trained_tokens": Metric(loss.count, jnp.float32(1)),
        **padding_metrics(batch.segment_ids),
    }
    return -total, logps_BT, metrics


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
    """One step on a global batch `[M, B, T]`."""

    def loss_sum(params: PyTree, micro: Batch) -> tuple[Array, Metrics]:
        total, _, metrics = token_losses(combine(params, state.frozen), micro, model=model)
        return total, metrics

    return update(state, loss_sum, batch, optimizer=optimizer, schedule=schedule, ema_decay=ema_decay)


def eval_step(params: PyTree, batch: Batch, *, model: Model) -> Metrics:
    """Held-out loss on rows `[M, B, T]`: per token, and per sequence (each sequence's summed loss)."""

    def micro_metrics(rows: Batch) -> Metrics:
        _, logps_BT, metrics = token_losses(params, rows, model=model)
        mask_BT = shift_left(rows.loss_mask)
        time = mask_BT.shape[1]
        has_target_BS = jax.vmap(
            lambda mask, segments: jnp.zeros((time + 1,), bool).at[segments].max(mask != 0)
        )(mask_BT, rows.segment_ids)
        sequences = jnp.sum(has_target_BS[:, 1:], dtype=jnp.float32)
        return {
            "eval/loss": metrics["loss"],
            "eval/loss_per_sequence": Metric(-jnp.sum(logps_BT), sequences),
            "eval/token_accuracy": metrics["token_accuracy"],
        }

    return eval_sums(micro_metrics, batch)


def steps(
    model: Model, train: Sequence[RowSource], held_out: Sequence[RowSource], row_tokens: int
) -> Steps[Batch]:
    """The functions above, bound to a model."""
    return Steps(
        make_state=functools.partial(init_state, model=model),
        train_step=functools.partial(train_step, model=model),
        eval_step=functools.partial(eval_step, model=model),
        train=train,
        held_out=held_out,
        batch=Batch,
        row_tokens=row_tokens,
        progress=PROGRESS,
        panels=PANELS,
        after_eval=lambda values: {**values, "eval/perplexity": math.exp(min(values["eval/loss"], 700.0))},
    )


ALGORITHM = TextAlgorithm(steps)
