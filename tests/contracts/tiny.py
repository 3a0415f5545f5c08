"""Small models, rows and jitted steps for the contract tests, put together from the shipped pieces."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from posttrain_jax.algorithms import sft
from posttrain_jax.core.optim import OptimOptions, make_optimizer, make_schedule
from posttrain_jax.core.sharding import (
    MESH_AXES,
    batch_sharding,
    jit_step,
    put_batch,
    replicated,
    tree_shardings,
)
from posttrain_jax.core.types import Array, Batch, Metrics, PyTree, TrainState
from posttrain_jax.core.updates import gradient_sums
from posttrain_jax.data.packing import KEYS
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.wiring.offline import jit_train_step

LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=8,
    head_dim=8,
    d_ff=64,
    query_scale=8**-0.5,
)
GEMMA = ModelConfig(
    model_type="gemma3_text",
    vocab_size=64,
    d_model=32,
    n_layers=3,
    n_heads=8,
    n_kv_heads=4,
    head_dim=8,
    d_ff=64,
    norm_plus_one=True,
    sandwich_norms=True,
    qk_norm=True,
    activation="gelu_tanh",
    embed_scale=32**0.5,
    query_scale=8**-0.5,
    attn_softcap=5.0,
    logits_softcap=3.0,
    sliding_window=6,
    local_layers=(True, False, True),
)


def untied(config: ModelConfig) -> ModelConfig:
    """The same model with a vocabulary projection of its own."""
    return dataclasses.replace(config, tied_embeddings=False)


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices (the shipped one takes all)."""
    devices = np.asarray(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def random_rows(rows: int, time: int, *, seed: int = 0, vocab: int = 64) -> dict[str, np.ndarray]:
    """Rows of two packed sequences and padding; the shares of trained tokens differ widely between rows.

    Row r trains about one token in r + 1, and the last row trains one token alone.
    """
    rng = np.random.default_rng(seed)
    arrays = {key: np.zeros((rows, time), np.int32) for key in KEYS}
    for row in range(rows):
        first = int(rng.integers(3, time - 6))
        second = int(rng.integers(3, time - first))
        for segment, (start, length) in enumerate(((0, first), (first, second)), 1):
            here = slice(start, start + length)
            arrays["tokens"][row, here] = rng.integers(1, vocab, length)
            arrays["segment_ids"][row, here] = segment
            arrays["positions"][row, here] = np.arange(length)
            arrays["loss_mask"][row, here] = rng.random(length) < 1 / (row + 1)
            arrays["loss_mask"][row, start] = 0
    arrays["loss_mask"][-1] = 0
    arrays["loss_mask"][:, 1] = 1
    return arrays


@functools.cache
def _shapes(config: ModelConfig) -> PyTree:
    return make_model(config, attention="xla").abstract_params()


def params_of(model: Model, mesh: Mesh, seed: int = 0) -> PyTree:
    """Random parameters in their places (norms' scales too, so that a dropped one shows), without compiling."""
    rng = np.random.default_rng(seed)
    shapes = _shapes(model.config)
    whole = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    return jax.device_put(whole, tree_shardings(whole, mesh))


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Mean loss, its gradient, and the batch's metrics."""

    loss: Array
    tree: PyTree


def loss_and_gradients(
    model: Model, params: PyTree, arrays: dict[str, np.ndarray], mesh: Mesh, micro_batches: int = 1
) -> Gradients:
    """Mean loss over the trained tokens and its gradient, by the functions that the train step is made of."""
    loss, tree = _gradient_step(model, mesh)(params, put_batch(arrays, mesh, micro_batches))
    return Gradients(loss, tree)


@functools.cache
def _gradient_step(model: Model, mesh: Mesh) -> Callable[[PyTree, Batch], tuple[Array, PyTree]]:
    def compute(params: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        def loss_sum(params: PyTree, micro: Batch) -> tuple[Array, Metrics]:
            total, _, metrics = sft.token_losses(params, micro, model=model)
            return total, metrics

        gradients, metrics = gradient_sums(loss_sum, params, batch)
        loss = metrics["loss"]
        return loss.sum / loss.count, jax.tree.map(lambda leaf: leaf / loss.count, gradients)

    places = tree_shardings(_shapes(model.config), mesh)
    return jit_step(
        compute, mesh, in_shardings=(places, batch_sharding(mesh)), out_shardings=(replicated(mesh), places)
    )


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A first state and the jitted step on a mesh, wired as `wiring.offline` wires them."""

    state: TrainState
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    put: Callable[..., Batch]
    places: Any


def make_trainer(
    mesh: Mesh,
    *,
    config: ModelConfig = LLAMA,
    micro_batches: int = 1,
    optimizer: str = "adamw",
    schedule: str = "constant",
    lr: float = 1e-2,
    steps: int = 30,
    ema: float = 0.0,
    clip_norm: float = 1.0,
    weight_decay: float = 0.01,
    on_trace: Callable[[], None] = lambda: None,
) -> Trainer:
    """A trainer whose parameters depend on `config` alone; `on_trace` is called whenever the step is traced."""
    model = make_model(config, remat="none", attention="xla")
    plain_rate = make_schedule(
        OptimOptions(schedule=schedule, lr=lr, warmup=2, min_lr_ratio=0.1), steps=steps
    )

    def rate(step: Array) -> Array:
        on_trace()
        return plain_rate(step)

    rule = make_optimizer(
        OptimOptions(name=optimizer, clip_norm=clip_norm, weight_decay=weight_decay, momentum=0.9), rate
    )
    key = jax.random.key(0)
    state = sft.init_state(params_of(model, mesh), key, model=model, optimizer=rule, ema_decay=ema)
    places = tree_shardings(state, mesh)
    step = functools.partial(sft.train_step, model=model, optimizer=rule, schedule=rate, ema_decay=ema)
    # Copied, for `new_state` uses one zero for three counters, and a donated buffer must have one owner.
    state = jax.device_put(jax.tree.map(jnp.copy, state), places)
    return Trainer(
        state=state,
        step=jit_train_step(step, mesh, state),
        put=functools.partial(put_batch, mesh=mesh, micro_batches=micro_batches),
        places=places,
    )


def worst_difference(tree: PyTree, reference: PyTree) -> float:
    """The largest difference of any leaf, relative to that leaf's largest entry."""

    def one(a: Array, b: Array) -> float:
        a, b = np.asarray(a), np.asarray(b)
        return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(one, tree, reference)))
