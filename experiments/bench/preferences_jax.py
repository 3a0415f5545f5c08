"""Ours: the pieces that `launch.train` puts together (packed rows, the algorithm's train_step, jit_step), on the pairs.

Variants: "ROWSxLENGTH", rows of a micro-batch and tokens of a row; "" is "1x1024".
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.bench.preferences_contract import (
    BETA,
    Recorder,
    Settings,
    load_head,
    pairs_of_steps,
    parse_settings,
)
from experiments.bench.preferences_prepare import load_source
from launch.entry import set_up_jax
from posttrain_jax.algorithms import dpo, reward_model
from posttrain_jax.core.optim import OptimOptions, make_optimizer, make_schedule
from posttrain_jax.core.sharding import batch_sharding, jit_step, make_mesh, put_batch
from posttrain_jax.core.types import Metric, PreferenceBatch, PyTree
from posttrain_jax.data.preference_groups import PreferenceData, PreferenceSource
from posttrain_jax.data.preference_rows import PreferenceRows, RowShape, row_shape
from posttrain_jax.forward.reference_cache import reference_logps
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.spec import init_state
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.wiring.data import share_prompt

DPO = dpo.Options(beta=BETA)
REWARD = reward_model.Options(normalize="none", bootstrap=False)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How pairs lie in rows: their shape, and M, the micro-batches that a step's rows are cut into."""

    shape: RowShape
    micro_batches: int


def layout_of(settings: Settings, source: PreferenceSource, model: Model) -> Layout:
    """What the variant says."""
    micro_rows, length = map(int, (settings.variant or "1x1024").split("x"))
    if settings.pairs_per_step % micro_rows:
        raise SystemExit(f"error: {settings.pairs_per_step} rows do not divide into {micro_rows} at a time")
    shape = row_shape(
        [PreferenceData((source,))],
        groups=settings.pairs_per_step,
        length=length,
        share_prompt=share_prompt("auto", model.module.implementation),
    )
    return Layout(shape, settings.pairs_per_step // micro_rows)


def reference(
    settings: Settings, source: PreferenceSource, model: Model, params: PyTree, layout: Layout, mesh: Mesh
) -> np.ndarray | None:
    """The reference's log-probabilities `[S]`, from the disk where they are there; None for a reward model."""
    if settings.setting != "dpo":
        return None
    known = reference_logps(
        model,
        params,
        [source],
        layout.shape,
        mesh,
        groups=settings.pairs_per_step,
        micro_batches=layout.micro_batches,
        workdir=settings.rows,
        folder=settings.rows / "reference",
    )
    return known[0][:, 0]


def make_step(
    settings: Settings, model: Model, params: PyTree, layout: Layout, mesh: Mesh
) -> tuple[PyTree, Callable[[PyTree, PreferenceBatch], Any]]:
    """The first state (it takes `params` over) and the jitted step."""
    schedule = make_schedule(OptimOptions(schedule="constant", lr=settings.lr), steps=settings.steps)
    optimizer = make_optimizer(OptimOptions(name="adamw", clip_norm=1.0), schedule)
    share = layout.shape.share_prompt
    key = jax.random.key(0)
    if settings.setting == "dpo":
        make = functools.partial(init_state, model=model, optimizer=optimizer, ema_decay=0.0)
    else:
        head = {
            "kernel": jnp.asarray(load_head(settings.rows)),
            "gain": jnp.float32(1),
            "bias": jnp.float32(0),
        }
        params = {**params, "score_head": head}
        make = functools.partial(
            reward_model.init_state,
            model=model,
            optimizer=optimizer,
            ema_decay=0.0,
            options=REWARD,
        )
    state = jit_step(make, mesh, in_shardings=None, out_shardings=None, donate=(0,))(params, key)
    common = {"model": model, "optimizer": optimizer, "schedule": schedule, "share_prompt": share}
    if settings.setting == "dpo":
        train = functools.partial(
            dpo.train_step,
            ema_decay=0.0,
            options=DPO,
            reference=lambda frozen, params, micro: micro.reference_logps,
            **common,
        )
        shardings: tuple[Any, ...] = (None, batch_sharding(mesh), None)
        step = jit_step(train, mesh, in_shardings=shardings, out_shardings=None, donate=(0,))
        return state, lambda state, batch: step(state, batch, {})
    train = functools.partial(reward_model.train_step, ema_decay=0.0, options=REWARD, **common)
    shardings = (None, batch_sharding(mesh))
    return state, jit_step(train, mesh, in_shardings=shardings, out_shardings=None, donate=(0,))


def mean(metric: Metric) -> float:
    """A metric's value."""
    return float(np.divide(metric.sum, metric.count))


def places(arrays: dict[str, np.ndarray], layout: Layout) -> int:
    """Places of the micro-batches that the step does not leave out."""
    rows, length = arrays["tokens"].shape
    size = rows // layout.micro_batches
    used = int((arrays["segment_ids"] != 0).any(axis=1).sum())
    return -(-used // size) * size * length


def main() -> None:
    """Trains for a few steps and prints the line."""
    settings = parse_settings(__doc__)
    set_up_jax()
    mesh = make_mesh()
    info = json.loads((settings.rows / "info.json").read_text("utf-8"))
    source = load_source(settings.rows, info["pairs"], info["max_length"])
    loaded = load_model(str(settings.rows / "model"), mesh=mesh)
    model = make_model(loaded.config)
    params = loaded.params
    del loaded
    layout = layout_of(settings, source, model)
    known = reference(settings, source, model, params, layout, mesh)
    if settings.prepare:
        return
    rows = PreferenceRows(source, layout.shape, known)
    state, step = make_step(settings, model, params, layout, mesh)
    del params
    margin = {"dpo": "train/rewards/margins", "reward_model": "train/margins"}[settings.setting]
    recorder = Recorder("jax", settings, {"jax": jax.__version__})
    recorder.start()
    for chosen in pairs_of_steps(settings, len(rows)):
        arrays = rows.collate([rows[i] for i in chosen])
        batch = put_batch(arrays, mesh, layout.micro_batches, PreferenceBatch)
        state, metrics = step(state, batch)
        found = jax.device_get(metrics)
        jax.block_until_ready(state)
        recorder.step(
            loss=mean(found["train/loss"]), margin=mean(found[margin]), places=places(arrays, layout)
        )
    recorder.finish()


if __name__ == "__main__":
    main()
