"""Kahneman-Tversky optimization: completions that are good or bad, each alone, without pairs (arXiv:2402.01306).

The step, from top to bottom: prompts, each with its completion and with one that answers another prompt -> hidden
states, the prompt's once -> log-probabilities -> the reference point z0, the mean log-ratio of the mismatched
completions over the whole step, without gradient -> the loss of the labeled ones -> gradient sums, one division, clip,
optimizer, EMA. Where the step has several micro-batches, a forward pass over all of them gives z0 first, so that how
rows are cut never changes the result.

The reference is the model that training starts from; its log-probabilities are cached
(posttrain_jax/forward/reference_cache.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.algorithms.contract import PreferenceAlgorithm, PreferenceSetup, Steps
from posttrain_jax.core.schema import check, setting
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import (
    Array,
    Metric,
    Metrics,
    Panel,
    PreferenceBatch,
    ProgressField,
    PyTree,
    TrainState,
)
from posttrain_jax.core.updates import (
    eval_sums,
    map_micro_batches,
    padding_metrics,
    update,
    used_micro_batches,
)
from posttrain_jax.data.mismatched import with_mismatched
from posttrain_jax.forward.completions import policy_logps
from posttrain_jax.losses.kto import kto_kl_baseline, kto_loss
from posttrain_jax.models.spec import init_state
from posttrain_jax.models.transformer import Model
from posttrain_jax.run import curves, progress

PROGRESS = (
    ProgressField("loss {:.4f}", ("train/loss",)),
    ProgressField(
        "rewards {:.3f} chosen {:.3f} rejected", ("train/rewards/chosen", "train/rewards/rejected")
    ),
    ProgressField("KL {:.3f}", ("train/kl",)),
    *progress.RATES,
)
PANELS = (
    Panel("loss (mean over completions)", ("train/loss", "eval/loss")),
    Panel("reward (beta x nats)", ("train/rewards/chosen", "train/rewards/rejected")),
    Panel("held-out reward (beta x nats)", ("eval/rewards/chosen", "eval/rewards/rejected")),
    Panel("KL estimate z0 (nats per completion)", ("train/kl", "eval/kl")),
    *curves.TRAINING,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `kto` of a config. The paper keeps lambda_D n_D / (lambda_U n_U) between 1 and 4/3, for n_D desirable
    and n_U undesirable completions."""

    beta: float = setting(0.1, "strength of the pull to the reference", above=0)
    desirable_weight: float = setting(1.0, "lambda_D", maximum=1e6)
    undesirable_weight: float = setting(1.0, "lambda_U", maximum=1e6)

    def __post_init__(self) -> None:
        check(self, "kto")


def baseline(params: PyTree, batch: PreferenceBatch, *, model: Model, share_prompt: bool) -> Array:
    """z0 of a step's rows `[M, B, ...]`: scalar, nats, at least 0, without gradient."""
    score = functools.partial(policy_logps, params, model=model, share_prompt=share_prompt)
    logps = map_micro_batches(score, batch, used_micro_batches(batch.segment_ids))[..., 0]
    mismatched = (batch.labels < 0) & (batch.sequence_ids != 0)
    return kto_kl_baseline(logps, batch.reference_logps, mismatched)


def label_losses(
    params: PyTree, batch: PreferenceBatch, z0: Array, *, model: Model, options: Options, share_prompt: bool
) -> tuple[Array, Metrics]:
    """Sum of the losses of the labeled completions of rows `[B, ...]` (differentiable), and metrics."""
    logps_BN = policy_logps(params, batch, model=model, share_prompt=share_prompt)[..., 0]
    labeled_BN = (batch.labels >= 0) & (batch.sequence_ids != 0)
    output = kto_loss(
        logps_BN,
        batch.reference_logps,
        batch.labels > 0,
        beta=options.beta,
        kl_baseline=z0,
        desirable_weight=options.desirable_weight,
        undesirable_weight=options.undesirable_weight,
        weights_B=labeled_BN,
    )
    metrics = jax.lax.stop_gradient(output.metrics) | {
        "completions": Metric(jnp.sum(labeled_BN, dtype=jnp.float32), jnp.float32(1)),
        **padding_metrics(batch.segment_ids),
    }
    return jnp.sum(output.loss), metrics


def train_step(
    state: TrainState,
    batch: PreferenceBatch,
    *,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    options: Options,
    share_prompt: bool,
) -> tuple[TrainState, Metrics]:
    """One step on a global batch `[M, B, ...]`."""
    z0 = baseline(combine(state.params, state.frozen), batch, model=model, share_prompt=share_prompt)

    def loss_sum(params: PyTree, micro: PreferenceBatch) -> tuple[Array, Metrics]:
        whole = combine(params, state.frozen)
        return label_losses(whole, micro, z0, model=model, options=options, share_prompt=share_prompt)

    return update(
        state,
        loss_sum,
        batch,
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=ema_decay,
        used=used_micro_batches(batch.segment_ids),
    )


def eval_first(params: PyTree, batch: PreferenceBatch, *, model: Model, share_prompt: bool) -> Metrics:
    """What z0 of all held-out rows is made of: the log-ratios of the mismatched completions of rows `[M, B, ...]`."""
    score = functools.partial(policy_logps, params, model=model, share_prompt=share_prompt)
    logps = map_micro_batches(score, batch, used_micro_batches(batch.segment_ids))[..., 0]
    mismatched = (batch.labels < 0) & (batch.sequence_ids != 0)
    ratios = jnp.where(mismatched, logps - batch.reference_logps, 0.0)
    return {"log_ratio": Metric(jnp.sum(ratios), jnp.sum(mismatched, dtype=jnp.float32))}


def eval_step(
    params: PyTree,
    batch: PreferenceBatch,
    first: dict[str, Array],
    *,
    model: Model,
    options: Options,
    share_prompt: bool,
) -> Metrics:
    """Held-out metrics on rows `[M, B, ...]`, per labeled completion; z0 is that of all held-out rows (`first`)."""
    z0 = jnp.maximum(first["log_ratio"], 0.0)

    def micro_metrics(micro: PreferenceBatch) -> Metrics:
        return label_losses(params, micro, z0, model=model, options=options, share_prompt=share_prompt)[1]

    metrics = eval_sums(micro_metrics, batch)
    left_out = {"completions", "tokens", "padding_share"}
    return {f"eval/{name}": metric for name, metric in metrics.items() if name not in left_out}


def steps(options: Options, setup: PreferenceSetup) -> Steps[PreferenceBatch]:
    """The functions above, bound to a model and its reference."""
    model, data = setup.spec.model, setup.data
    share = data.shape.share_prompt
    return Steps(
        make_state=functools.partial(init_state, model=model),
        train_step=functools.partial(train_step, model=model, options=options, share_prompt=share),
        eval_first=functools.partial(eval_first, model=model, share_prompt=share),
        eval_step=functools.partial(eval_step, model=model, options=options, share_prompt=share),
        train=data.train_rows([logps_S2[:, 0] for logps_S2 in setup.reference.train]),
        held_out=data.held_out_rows([logps_S2[:, 0] for logps_S2 in setup.reference.held_out]),
        batch=PreferenceBatch,
        row_tokens=data.shape.length,
        progress=PROGRESS,
        panels=PANELS,
    )


ALGORITHM = PreferenceAlgorithm(
    section="kto",
    options=Options,
    steps=steps,
    reference=lambda options: "cached",
    change_data=with_mismatched,
)
