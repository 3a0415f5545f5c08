"""Ours: the pieces that `launch.train` puts together (model, sft.train_step, jit_step), on the packed rows.

Variants: names of `train.remat`; "" is the default, "elementwise".
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from experiments.bench.contract import Recorder, load_packed, parse_settings
from launch.entry import set_up_jax
from posttrain_jax.algorithms import sft
from posttrain_jax.core.optim import OptimOptions, make_optimizer, make_schedule
from posttrain_jax.core.sharding import batch_sharding, jit_step, make_mesh, put_batch
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.models.config import LoraConfig
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.transformer import make_model


def main() -> None:
    """Trains for a few steps and prints the line."""
    settings = parse_settings(__doc__)
    set_up_jax()
    mesh = make_mesh()
    loaded = load_model(str(settings.rows / "model"), mesh=mesh)
    lora = LoraConfig(rank=settings.lora_rank, alpha=2.0 * settings.lora_rank)
    model = make_model(loaded.config, remat=settings.variant or "elementwise", lora=lora)
    schedule = make_schedule(OptimOptions(schedule="constant", lr=settings.lr), steps=settings.steps)
    optimizer = make_optimizer(OptimOptions(name="adamw", clip_norm=1.0), schedule)
    params = loaded.params
    del loaded
    if lora.rank:
        adapters = jax.jit(
            lambda key: partition(model.init(key), lambda p: p.endswith(("lora_a", "lora_b")))[0]
        )
        params = combine(params, adapters(jax.random.key(0)))
    make_state = functools.partial(sft.init_state, model=model, optimizer=optimizer, ema_decay=0.0)
    state = jit_step(make_state, mesh, in_shardings=None, out_shardings=None, donate=(0,))(
        params, jax.random.key(0)
    )
    del params
    step = jit_step(
        functools.partial(sft.train_step, model=model, optimizer=optimizer, schedule=schedule, ema_decay=0.0),
        mesh,
        in_shardings=(None, batch_sharding(mesh)),
        out_shardings=None,
        donate=(0,),
    )
    recorder = Recorder("jax", settings, {"jax": jax.__version__})
    batches = list(load_packed(settings.rows).batches(settings))
    recorder.start()
    for batch in batches:
        arrays = {
            "tokens": batch.tokens,
            "loss_mask": batch.loss_mask,
            "segment_ids": batch.segment_ids,
            "positions": batch.positions,
        }
        state, metrics = step(state, put_batch(arrays, mesh, 1))
        loss = jax.device_get(metrics["train/loss"])
        jax.block_until_ready(state)
        recorder.step(loss=float(np.divide(loss.sum, loss.count)), real=batch.real, trained=batch.trained)
    recorder.finish()


if __name__ == "__main__":
    main()
