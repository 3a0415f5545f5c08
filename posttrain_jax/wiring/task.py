"""What the tasks of all algorithms are made of: rows of this process, steps, optimizer, key, sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.optim import OptimOptions, make_optimizer, make_schedule
from posttrain_jax.core.sharding import host_data_shards, tree_shardings
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.data.loader import Loader, RowSource
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.run.options import TrainOptions


def make_loader(train: TrainOptions, rows: Sequence[RowSource], mesh: Mesh, *, seed: int) -> Loader:
    """This process's share of the training rows.

    Raises:
      InputError: rows_per_step does not divide into micro-batches and devices; says which numbers would.
    """
    micro_batches(train, mesh)
    total = sum(len(part) for part in rows)
    if total < train.rows_per_step:
        log_on_host0(
            f"There are {total:,} rows to train on and train.rows_per_step={train.rows_per_step}, so every step has "
            "some rows more than once; lower train.rows_per_step."
        )
    index, count = host_data_shards(mesh)
    return Loader(rows, rows_per_step=train.rows_per_step, seed=seed, host_index=index, host_count=count)


def micro_batches(train: TrainOptions, mesh: Mesh) -> int:
    """M: how many micro-batches a step's rows are cut into."""
    rows, micro = train.rows_per_step, train.micro_rows or train.rows_per_step
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if micro <= 0 or rows <= 0 or rows % micro or micro % shards:
        fitting = [n for n in range(shards, rows + 1, shards) if rows % n == 0]
        advice = (
            f"it could be {', '.join(map(str, fitting))}"
            if fitting
            else f"make rows_per_step a multiple of {shards}"
        )
        raise InputError(
            f"train.micro_rows={micro} must divide train.rows_per_step={rows} and be a multiple of "
            f"mesh.data x mesh.fsdp = {shards}: {advice}."
        )
    return rows // micro


def run_steps(train: TrainOptions, rows: Sequence[RowSource]) -> int:
    """`train.steps`, or as many as `train.epochs` over the rows take.

    Raises:
      InputError: neither or both are set.
    """
    if (train.steps > 0) == (train.epochs > 0):
        raise InputError("Set exactly one of train.steps and train.epochs to more than 0.")
    if train.steps > 0:
        return train.steps
    total = sum(len(part) for part in rows)
    # The number as it is written: 1.1 x 100 rows are 110, and in floating point a little more.
    steps = Fraction(repr(train.epochs)) * total / train.rows_per_step
    return max(1, math.ceil(steps))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation and the schedule inside it, for the logs."""

    transformation: optax.GradientTransformationExtraArgs
    schedule: Callable[[Array], Array]


def optimizer_of(options: OptimOptions, *, updates: int) -> Optimizer:
    """The optimizer that the section `optim` names, over so many updates."""
    schedule = make_schedule(options, steps=updates)
    return Optimizer(make_optimizer(options, schedule), schedule)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of forward and backward for one token: 6 per matrix parameter (the head included, the
    embedding's look-up not) and 12 L H K T / 2 for causal attention (PaLM, arXiv:2204.02311, appendix B)."""
    heads = config.n_heads * config.head_dim
    attention = config.d_model * heads * 2 + config.d_model * config.n_kv_heads * config.head_dim * 2
    matrices = config.n_layers * (attention + 3 * config.d_model * config.d_ff)
    matrices += config.vocab_size * config.d_model
    return 6.0 * matrices + 6.0 * config.n_layers * heads * length


def abstract_on_mesh(make: Callable[..., PyTree], mesh: Mesh, *arguments: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of what `make` would give, without making it."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(make, *arguments)
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def seed_key(seed: int) -> Array:
    """The run's typed PRNG key."""
    return jax.random.key(np.uint32(seed))
