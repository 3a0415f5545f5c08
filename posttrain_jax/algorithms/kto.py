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
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict as Config

from posttrain_jax.algorithms.dpo import DEFAULTS
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import Array, Metric, Metrics, PreferenceBatch, PyTree, Task, TrainState
from posttrain_jax.core.updates import apply_gradients, gradient_sums, map_micro_batches, used_micro_batches
from posttrain_jax.data.mismatched import with_mismatched
from posttrain_jax.data.preference_groups import PreferenceData
from posttrain_jax.data.preference_rows import PreferenceRows, RowShape
from posttrain_jax.forward.completions import policy_logps
from posttrain_jax.forward.reference_cache import reference_logps
from posttrain_jax.losses.kto import kto_kl_baseline, kto_loss
from posttrain_jax.models.transformer import Model
from posttrain_jax.wiring.data import preferences_from_config
from posttrain_jax.wiring.experiment import (
    Offline,
    init_state,
    mesh_from_config,
    micro_batches,
    model_spec_from_config,
    seed_key,
    task_from_config,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """KTO's numbers.

    Attributes:
      beta: strength of the pull to the reference.
      desirable_weight, undesirable_weight: lambda_D and lambda_U; the paper keeps lambda_D n_D / (lambda_U n_U)
        between 1 and 4/3.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float


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
    real = jnp.sum(batch.segment_ids != 0, dtype=jnp.float32)
    metrics = jax.lax.stop_gradient(output.metrics) | {
        "completions": Metric(jnp.sum(labeled_BN, dtype=jnp.float32), jnp.float32(1)),
        "tokens": Metric(real, jnp.float32(1)),
        "padding_share": Metric(jnp.float32(batch.tokens.size) - real, jnp.float32(batch.tokens.size)),
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

    used = used_micro_batches(batch.segment_ids)
    gradients, metrics = gradient_sums(loss_sum, state.params, batch, used=used)
    loss = metrics["loss"]
    lr = schedule(state.step - state.skipped)  # the optimizer does not count skipped steps
    state, update_metrics = apply_gradients(
        state, gradients, loss.sum, optimizer=optimizer, count=loss.count, ema_decay=ema_decay
    )
    sums = {"completions", "tokens"}
    named = {
        f"train/{name}": Metric.of(metric.sum) if name in sums else metric for name, metric in metrics.items()
    }
    return state, {**named, **update_metrics, "train/lr": Metric.of(lr)}


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

    stacked = map_micro_batches(micro_metrics, batch, used_micro_batches(batch.segment_ids))
    metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)
    left_out = {"completions", "tokens", "padding_share"}
    return {f"eval/{name}": metric for name, metric in metrics.items() if name not in left_out}


def from_config(config: Config, workdir: Path) -> Task:
    """Everything the training loop needs, from an experiment's config.

    Raises:
      InputError: a bad value, a bad row, a model that cannot be used.
    """
    options = options_from_config(config)
    mesh = mesh_from_config(config)
    policy = model_spec_from_config(config)
    model = policy.model
    paired = functools.partial(with_mismatched, seed=config.seed, max_length=config.data.max_length)
    data = preferences_from_config(
        config, policy.tokenizer, workdir, attention=model.module.implementation, change=paired
    )

    def rows(start: PyTree, part: PreferenceData | None, shape: RowShape) -> list[PreferenceRows]:
        if part is None:
            return []
        known = reference_logps(
            model,
            start,
            part.sources,
            data.shape,
            mesh,
            groups=config.train.rows_per_step,
            micro_batches=micro_batches(config, mesh),
            workdir=workdir,
        )
        return [PreferenceRows(s, shape, logps[:, 0]) for s, logps in zip(part.sources, known, strict=True)]

    start = policy.init_params(mesh, seed_key(config.seed))
    train, held_out = rows(start, data.train, data.shape), rows(start, data.held_out, data.eval_shape)
    del start
    share = data.shape.share_prompt
    algorithm = Offline(
        make_state=functools.partial(init_state, model=model),
        train_step=functools.partial(train_step, model=model, options=options, share_prompt=share),
        eval_first=functools.partial(eval_first, model=model, share_prompt=share),
        eval_step=functools.partial(eval_step, model=model, options=options, share_prompt=share),
        train=train,
        held_out=held_out,
        batch=PreferenceBatch,
        row_tokens=data.shape.length,
    )
    return task_from_config(config, workdir, policy, mesh, algorithm)


def options_from_config(config: Config) -> Options:
    """KTO's numbers.

    Raises:
      InputError: a number out of its range; a key of DPO is set.
    """
    kto = config.kto
    for name, default in DEFAULTS.items():
        if config.dpo[name] != default:
            raise InputError(
                f"dpo.{name} is {config.dpo[name]}, and algorithm=kto does not look at it; its keys are kto.beta, "
                "kto.desirable_weight and kto.undesirable_weight."
            )
    if not kto.beta > 0:
        raise InputError(f"kto.beta is {kto.beta}; it must be more than 0.")
    if not (kto.desirable_weight >= 0 and kto.undesirable_weight >= 0):
        raise InputError("kto.desirable_weight and kto.undesirable_weight must be 0 or more.")
    return Options(kto.beta, kto.desirable_weight, kto.undesirable_weight)
