"""Every mesh computes what one device computes, and really splits what it holds."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from contracts.tiny import (
    GEMMA,
    LLAMA,
    Gradients,
    loss_and_gradients,
    make_mesh,
    make_trainer,
    params_of,
    random_rows,
    untied,
    worst_difference,
)
from posttrain_jax.core.trees import byte_count, leaf_paths
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.transformer import make_model

MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 2, 1), (1, 2, 4), (2, 1, 4), (1, 4, 2), (2, 1, 1))
CONFIGS = {"llama": LLAMA, "llama_untied": untied(LLAMA), "gemma": GEMMA, "gemma_untied": untied(GEMMA)}
CASES = [
    *(("llama", mesh) for mesh in MESHES),
    *(("gemma_untied", mesh) for mesh in MESHES[:5]),
    *(("llama_untied", mesh) for mesh in MESHES[2:4]),
    ("gemma", (2, 2, 2)),
]
# Float32 sums in another order: the largest error of a leaf, relative to its largest entry.
TOLERANCE = 1e-5

_REFERENCES: dict[str, Gradients] = {}


def compute(config: ModelConfig, mesh_shape: tuple[int, int, int]) -> Gradients:
    mesh = make_mesh(*mesh_shape)
    model = make_model(config, attention="xla")
    return loss_and_gradients(model, params_of(model, mesh), random_rows(8, 16), mesh)


def reference(name: str) -> Gradients:
    if name not in _REFERENCES:
        _REFERENCES[name] = compute(CONFIGS[name], (1, 1, 1))
    return _REFERENCES[name]


@pytest.mark.parametrize(
    "name,mesh_shape", CASES, ids=lambda value: str(value).replace(", ", "x").strip("()")
)
def test_mesh_gives_the_loss_and_gradients_of_one_device(name: str, mesh_shape: tuple[int, int, int]):
    got = compute(CONFIGS[name], mesh_shape)
    want = reference(name)
    assert float(got.loss) == pytest.approx(float(want.loss), rel=TOLERANCE)
    assert worst_difference(got.tree, want.tree) < TOLERANCE


def bytes_on(device: jax.Device, tree) -> int:
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize("mesh_shape,share", [((1, 8, 1), 8), ((1, 1, 8), 8), ((2, 2, 2), 4), ((8, 1, 1), 1)])
def test_parameters_and_optimizer_state_are_split_over_fsdp_and_tensor(mesh_shape, share):
    """What is left whole are norms, biases and scalars: under 3 % of this tiny model."""
    state = make_trainer(make_mesh(*mesh_shape), ema=0.9).state
    for name, tree in (("params", state.params), ("opt_state", state.opt_state), ("ema", state.ema)):
        whole = byte_count(tree)
        held = {device: bytes_on(device, tree) for device in jax.devices()}
        assert len(set(held.values())) == 1, f"{name} is not spread evenly: {held}"
        per_device = held[jax.devices()[0]]
        assert per_device <= whole / share + 0.03 * whole, (
            f"{name}: {per_device} of {whole} bytes on each device"
        )
        assert per_device >= whole // share


def test_state_stays_split_after_a_step():
    mesh = make_mesh(2, 2, 2)
    trainer = make_trainer(mesh)
    places = trainer.places
    state, _ = trainer.step(trainer.state, trainer.put(random_rows(8, 16)))
    for path, leaf, place in zip(
        leaf_paths(state), jax.tree.leaves(state), jax.tree.leaves(places), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path


def test_a_width_that_does_not_divide_is_left_whole_and_still_right():
    """Vocabulary 63 on tensor=8: that axis stays whole, everything else is split, and the numbers agree."""
    import dataclasses

    config = dataclasses.replace(LLAMA, vocab_size=63)
    rows = random_rows(8, 16, vocab=63)
    model = make_model(config, attention="xla")
    results = []
    for shape in ((1, 1, 1), (1, 1, 8)):
        mesh = make_mesh(*shape)
        results.append(loss_and_gradients(model, params_of(model, mesh), rows, mesh))
    assert worst_difference(results[1].tree, results[0].tree) < TOLERANCE
    embedding = params_of(model, make_mesh(1, 1, 8))["embed"]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(63, 32)}


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (4, 2)])
def test_rows_are_split_over_data_and_fsdp(shape: tuple[int, int]):
    mesh = make_mesh(*shape, 1)
    trainer = make_trainer(mesh, micro_batches=1)
    arrays = random_rows(8, 16)
    tokens = trainer.put(arrays).tokens
    rows = {shard.data.shape[1] for shard in tokens.addressable_shards}
    assert rows == {8 // (shape[0] * shape[1])}
    np.testing.assert_array_equal(np.asarray(tokens)[0], arrays["tokens"])
