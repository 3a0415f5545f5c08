"""Prompts with a few completions each, tiny models, and gradients on a mesh, for tests of preference learning."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from contracts.tiny import GEMMA, LLAMA
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tasks import task_of

from posttrain_jax.core.sharding import jit_step, put_batch, replicated, tree_shardings
from posttrain_jax.core.types import Array, Metrics, PreferenceBatch, PyTree
from posttrain_jax.core.updates import gradient_sums, used_micro_batches
from posttrain_jax.data.preference_groups import PreferenceData
from posttrain_jax.data.preference_rows import PreferenceRows, row_shape
from posttrain_jax.data.tokenized import TokenizeOptions
from posttrain_jax.data.tokenized_preferences import build_preferences
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.run.checkpoint import Checkpoints

WORDS = ("red", "a much longer answer that goes on for a while", "no", "perhaps, but who can tell", "yes!")

# (parameters, rows `[B, ...]`) -> (sum of the losses, metrics)
LossSum = Callable[[PyTree, PreferenceBatch], tuple[Array, Metrics]]


def ranked_data(folder: Path) -> PreferenceData:
    """Seven prompts with two to four completions each; of a prompt the last completion has the highest score."""
    rows = [
        {
            "prompt": "question " * (i % 3 + 1) + str(i),
            "completions": [f"{WORDS[(i + k) % 5]} {i}" for k in range(2 + i % 3)],
            "scores": list(range(2 + i % 3)),
        }
        for i in range(7)
    ]
    return data_of(rows, folder)


def data_of(rows: list[dict], folder: Path) -> PreferenceData:
    """Rows through a file, the byte tokenizer and the cache."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_preferences(
        str(folder / "rows.jsonl"), byte_tokenizer(), TokenizeOptions(), cache_dir=folder
    )


@functools.cache
def tiny_model(family: str, attention: str = "xla") -> Model:
    config = dataclasses.replace({"llama": LLAMA, "gemma": GEMMA}[family], vocab_size=260)
    return make_model(config, attention=attention, remat="none")


@functools.cache
def tiny_params(family: str, seed: int = 0) -> PyTree:
    """Normal(0, 0.1) everywhere, so that every parameter matters."""
    shapes = tiny_model(family).abstract_params()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), shapes)


def batch_of(
    data: PreferenceData, mesh: Mesh, *, share: bool, micro_batches: int, length: int = 0, rows: int = 8
) -> PreferenceBatch:
    """The first `rows` prompts of the first source (fewer where it has fewer) as `[M, B, ...]`."""
    shape = row_shape([data], groups=rows, length=length, share_prompt=share)
    source = PreferenceRows(data.sources[0], shape)
    groups = [source[i] if i < len(data) else None for i in range(rows)]
    return put_batch(source.collate(groups), mesh, micro_batches, PreferenceBatch)


def mean_gradient(
    loss_sum: LossSum, params: PyTree, batch: PreferenceBatch, mesh: Mesh
) -> tuple[Array, PyTree, Array]:
    """Mean loss, its gradient and the count, by the functions that the train steps are made of."""

    def compute(params: PyTree, batch: PreferenceBatch) -> tuple[Array, PyTree, Array]:
        used = used_micro_batches(batch.segment_ids)
        gradients, metrics = gradient_sums(loss_sum, params, batch, used=used)
        count = metrics["loss"].count
        return metrics["loss"].sum / count, jax.tree.map(lambda leaf: leaf / count, gradients), count

    step = jit_step(compute, mesh, in_shardings=None, out_shardings=replicated(mesh))
    return step(jax.device_put(params, tree_shardings(params, mesh)), batch)


def assert_same(got: PyTree, want: PyTree, tolerance: float = 2e-5) -> None:
    """Every leaf, relative to its largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.max(jnp.abs(b))), 1e-4)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


def untrained_reward_run(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The workdir of a reward model that was normalized but not trained (which saves compiling the train step).

    Returns:
      Its metrics on the held-out rows; {} without any.
    """
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    task = task_of(config, workdir)
    state = task.init_state()
    if task.finish is not None:
        state = task.finish(state)
    checkpoints = Checkpoints(workdir)
    checkpoints.save_frozen(state.frozen)
    checkpoints.save(state, {}, {})
    checkpoints.close()
    return task.evaluate(state) if task.evaluate is not None else {}
