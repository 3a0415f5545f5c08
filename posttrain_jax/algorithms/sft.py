"""Supervised fine-tuning: raise the log-probability of the assistant's tokens, and of nothing else.

The step, from top to bottom: rows of tokens -> hidden states -> log-probabilities of the trained tokens alone
(`models/heads.py`) -> sum of the negative log-likelihoods -> gradient sums over micro-batches -> one division by
the global count of trained tokens -> clip, optimiser, EMA, unless something is not finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config

from posttrain_jax.data.loader import eval_batches
from posttrain_jax.data.packing import PackedRows
from posttrain_jax.experiment import (
    Policy,
    abstract_on_mesh,
    flops_per_token,
    init_state,
    loader_from_config,
    mesh_from_config,
    micro_batches,
    optimizer_from_config,
    policy_from_config,
    rows_from_config,
    seed_key,
    steps_from_config,
)
from posttrain_jax.losses.logprobs import Projection
from posttrain_jax.losses.sft import nll_loss
from posttrain_jax.masking import shift_left
from posttrain_jax.metrics import Accumulator, to_host
from posttrain_jax.models.heads import sum_logps
from posttrain_jax.models.transformer import Model, head_VD
from posttrain_jax.optim import apply_gradients, gradient_sums
from posttrain_jax.sampling.fixed_prompts import answer_fixed_prompts
from posttrain_jax.sharding import batch_sharding, host_data_shards, jit_step, put_batch, replicated
from posttrain_jax.trees import combine
from posttrain_jax.types import Array, Batch, Metric, Metrics, PyTree, Task, TrainState


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
    real = jnp.sum(batch.segment_ids != 0, dtype=jnp.float32)
    metrics = {
        "loss": Metric(loss.metrics["loss"].sum, loss.count),
        "token_accuracy": Metric(jnp.sum(is_argmax_BT), loss.count),
        "trained_tokens": Metric(loss.count, jnp.float32(1)),
        "tokens": Metric(real, jnp.float32(1)),
        "padding_share": Metric(jnp.float32(batch.tokens.size) - real, jnp.float32(batch.tokens.size)),
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

    gradients, metrics = gradient_sums(loss_sum, state.params, batch)
    loss = metrics["loss"]
    lr = schedule(state.step)
    state, update_metrics = apply_gradients(
        state, gradients, loss.sum, optimizer=optimizer, count=loss.count, ema_decay=ema_decay
    )
    sums = {"trained_tokens", "tokens"}
    named = {
        f"train/{name}": Metric.of(metric.sum) if name in sums else metric for name, metric in metrics.items()
    }
    return state, {**named, **update_metrics, "train/lr": Metric.of(lr)}


def eval_step(params: PyTree, batch: Batch, *, model: Model) -> Metrics:
    """Held-out loss on rows `[1, B, T]`: per token, and per sequence (each sequence's summed loss)."""
    rows = jax.tree.map(lambda leaf: leaf[0], batch)
    _, logps_BT, metrics = token_losses(params, rows, model=model)
    mask_BT = shift_left(rows.loss_mask)
    time = mask_BT.shape[1]
    has_target_BS = jax.vmap(lambda mask, segments: jnp.zeros((time + 1,), bool).at[segments].max(mask != 0))(
        mask_BT, rows.segment_ids
    )
    sequences = jnp.sum(has_target_BS[:, 1:], dtype=jnp.float32)
    return {
        "eval/loss": metrics["loss"],
        "eval/loss_per_sequence": Metric(-jnp.sum(logps_BT), sequences),
        "eval/token_accuracy": metrics["token_accuracy"],
    }


def from_config(config: Config, workdir: Path) -> Task:
    """Everything the training loop needs, from an experiment's config.

    Raises:
      InputError: a bad value, a bad row, a model that cannot be used.
    """
    mesh = mesh_from_config(config)
    policy = policy_from_config(config)
    rows = rows_from_config(config, policy.tokenizer, workdir)
    loader = loader_from_config(config, rows.train, mesh)
    steps = steps_from_config(config, rows.train)
    optimizer = optimizer_from_config(config, steps)
    key = seed_key(config.seed)
    model = policy.model
    make_state = functools.partial(
        init_state,
        model=model,
        optimizer=optimizer.transformation,
        ema_decay=config.optim.ema,
    )
    abstract = abstract_on_mesh(make_state, mesh, model.abstract_params(), key)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def first_state() -> TrainState:
        params = policy.init_params(mesh, key)
        build = jit_step(make_state, mesh, in_shardings=None, out_shardings=places, donate=(0,))
        return build(params, key)

    if jax.process_index() == 0:
        policy.describe(workdir / "model")
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer.transformation,
        schedule=optimizer.schedule,
        ema_decay=config.optim.ema,
    )
    put = functools.partial(put_batch, mesh=mesh, micro_batches=micro_batches(config, mesh))
    return Task(
        steps=steps,
        init_state=first_state,
        abstract_state=abstract,
        rows=loader,
        put=put,
        train_step=jit_step(
            step,
            mesh,
            in_shardings=(places, batch_sharding(mesh)),
            out_shardings=(places, replicated(mesh)),
            donate=(0,),
        ),
        evaluate=_evaluation(config, rows.held_out, model, mesh) if rows.held_out else None,
        sample=_sampling(config, policy) if config.eval.prompts else None,
        flops_per_token=flops_per_token(model.config, config.data.max_length),
    )


def _evaluation(
    config: Config, held_out: Sequence[PackedRows], model: Model, mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """One pass over the held-out rows."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_rows = -(-config.eval.batch_rows // shards) * shards
    index, count = host_data_shards(mesh)
    step = jit_step(
        functools.partial(eval_step, model=model),
        mesh,
        in_shardings=None,
        out_shardings=replicated(mesh),
    )

    def evaluate(state: TrainState) -> dict[str, float]:
        params = combine(state.params, state.frozen)
        sums = Accumulator()
        for rows in eval_batches(held_out, rows_per_step=batch_rows, host_index=index, host_count=count):
            sums.add(to_host(step(params, put_batch(rows.arrays, mesh, 1))))
        values = sums.flush()
        values["eval/perplexity"] = math.exp(min(values["eval/loss"], 700.0))
        return values

    return evaluate


def _sampling(config: Config, policy: Policy) -> Callable[[TrainState], list[dict[str, Any]]]:
    """Greedy answers to the fixed prompts, for `samples.jsonl`."""
    return answer_fixed_prompts(
        policy.model,
        policy.tokenizer,
        config.eval.prompts,
        max_new_tokens=config.eval.max_new_tokens,
        seed=config.seed,
    )
