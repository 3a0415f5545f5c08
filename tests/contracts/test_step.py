"""The train step's promises: one compile, donated state, sums instead of means, skipped updates, optimizers, EMA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contracts.tiny import (
    GEMMA,
    LLAMA,
    Trainer,
    loss_and_gradients,
    make_mesh,
    make_trainer,
    params_of,
    random_rows,
    worst_difference,
)
from posttrain_jax.core.optim import OPTIMIZERS, SCHEDULES, OptimOptions, make_schedule
from posttrain_jax.data.packing import KEYS
from posttrain_jax.models.transformer import REMAT_POLICIES, make_model

ONE = (1, 1, 1)


def host(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def trajectory(trainer: Trainer, steps: int) -> tuple[list[float], dict]:
    """Mean losses of `steps` steps on rows that change, and the last parameters."""
    state, losses = trainer.state, []
    for step in range(steps):
        state, metrics = trainer.step(state, trainer.put(random_rows(8, 16, seed=step)))
        losses.append(float(metrics["train/loss"].sum / metrics["train/loss"].count))
    return losses, host(state.params)


@pytest.fixture(scope="module")
def full_batch() -> tuple[list[float], dict]:
    """One micro-batch of 8 rows on one device."""
    return trajectory(make_trainer(make_mesh(*ONE)), 5)


@pytest.mark.parametrize(
    "micro_batches,mesh_shape", [(4, ONE), (8, ONE), (1, (8, 1, 1)), (2, (2, 2, 2))], ids=str
)
def test_micro_batches_and_devices_follow_the_same_trajectory(full_batch, micro_batches, mesh_shape):
    """8 rows as 1x8, 4x2, 8x1 (micro-batches x rows), on 1 or 8 devices, five AdamW steps at 1e-2: losses to 1e-5
    and parameters to 2e-4 (AdamW divides rounding errors by tiny second moments). Trained tokens per micro-batch
    run from one to all, so a mean of means would differ in the first digit (next test)."""
    losses, params = trajectory(make_trainer(make_mesh(*mesh_shape), micro_batches=micro_batches), 5)
    np.testing.assert_allclose(losses, full_batch[0], rtol=1e-5)
    assert worst_difference(params, full_batch[1]) < 2e-4


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulated_gradients_are_the_full_batch_gradients(micro_batches):
    mesh, rows = make_mesh(*ONE), random_rows(8, 16)
    model = make_model(GEMMA, attention="xla")
    params = params_of(model, mesh)
    whole = loss_and_gradients(model, params, rows, mesh, 1)
    parts = loss_and_gradients(model, params, rows, mesh, micro_batches)
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-5)
    assert worst_difference(parts.tree, whole.tree) < 1e-5


def test_these_rows_would_betray_a_mean_of_means():
    """The micro-batches' own mean gradients, averaged, are far from the gradient: the tests above can fail."""
    mesh, rows = make_mesh(*ONE), random_rows(8, 16)
    model = make_model(LLAMA, attention="xla")
    params = params_of(model, mesh)
    whole = loss_and_gradients(model, params, rows, mesh).tree
    counts = [int(rows["loss_mask"][row].sum()) for row in range(8)]
    parts = [{key: rows[key][row : row + 1] for key in KEYS} for row in range(8)]
    trees = [loss_and_gradients(model, params, part, mesh).tree for part in parts]
    assert max(counts) >= 8 * min(counts)

    def average(weights: list[float]):
        return jax.tree.map(
            lambda *leaves: np.average(np.stack(leaves), axis=0, weights=weights), *host(trees)
        )

    assert worst_difference(average(counts), whole) < 1e-5
    assert worst_difference(average([1.0] * 8), whole) > 0.1


@pytest.mark.parametrize("mesh_shape", [ONE, (2, 2, 2)], ids=str)
def test_the_step_compiles_once_and_takes_the_state_for_itself(mesh_shape):
    traces: list[int] = []
    traces_of_step: list[int] = []
    trainer = make_trainer(
        make_mesh(*mesh_shape), ema=0.5, micro_batches=2, on_trace=lambda: traces.append(1)
    )
    state = trainer.state
    for step in range(4):
        before = state
        state, _ = trainer.step(before, trainer.put(random_rows(8, 16, seed=step)))
        traces_of_step.append(len(traces))
        assert traces_of_step[-1] == traces_of_step[0] > 0, f"step {step + 1} was traced again"
        kept = [leaf.shape for leaf in jax.tree.leaves(before) if not leaf.is_deleted()]
        assert not kept, f"not donated: {kept}"


def test_remat_policies_give_equal_gradients():
    mesh, rows = make_mesh(*ONE), random_rows(4, 16)
    results = {}
    for name in REMAT_POLICIES:
        model = make_model(GEMMA, remat=name, attention="xla")
        results[name] = loss_and_gradients(model, params_of(model, mesh), rows, mesh)
    for name, result in results.items():
        assert float(result.loss) == pytest.approx(float(results["none"].loss), rel=1e-6), name
        assert worst_difference(result.tree, results["none"].tree) < 1e-5, name


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=lambda config: config.model_type)
def test_packed_rows_equal_separate_rows(config):
    mesh, packed = make_mesh(*ONE), random_rows(3, 24)
    apart = {key: [] for key in KEYS}
    for row in range(3):
        for segment in (1, 2):
            where = packed["segment_ids"][row] == segment
            for key in KEYS:
                alone = np.zeros(24, np.int32)
                alone[: where.sum()] = packed[key][row, where]
                apart[key].append(alone if key != "segment_ids" else (alone != 0).astype(np.int32))
    model = make_model(config, attention="xla")
    params = params_of(model, mesh)
    want = loss_and_gradients(model, params, {key: np.stack(rows) for key, rows in apart.items()}, mesh)
    got = loss_and_gradients(model, params, packed, mesh)
    assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-5)
    assert worst_difference(got.tree, want.tree) < 1e-5


def test_a_batch_without_trained_tokens_changes_nothing_but_the_decay():
    """Count 0: the gradient is 0 / max(0, 1), the loss has no value, and nothing becomes NaN."""
    trainer = make_trainer(make_mesh(*ONE), weight_decay=0.0)
    before = host(trainer.state.params)
    rows = random_rows(8, 16)
    rows["loss_mask"][:] = 0
    state, metrics = trainer.step(trainer.state, trainer.put(rows))
    assert float(metrics["train/loss"].count) == 0
    assert int(state.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, host(state.params), before)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(poison):
    trainer = make_trainer(make_mesh(2, 2, 2), ema=0.9)
    state, _ = trainer.step(trainer.state, trainer.put(random_rows(8, 16)))
    good_scale = jnp.array(state.params["final_norm"]["scale"])
    state.params["final_norm"]["scale"] = jax.device_put(good_scale.at[0].set(poison), good_scale.sharding)
    before = host((state.params, state.opt_state, state.ema))
    for in_row in (1, 2):
        state, metrics = trainer.step(state, trainer.put(random_rows(8, 16, seed=in_row)))
        jax.tree.map(np.testing.assert_array_equal, host((state.params, state.opt_state, state.ema)), before)
        assert (int(state.skipped), int(state.skipped_in_row)) == (in_row, in_row)
        assert float(metrics["train/skipped_in_row"].sum) == in_row
        assert int(state.step) == 1 + in_row
    state.params["final_norm"]["scale"] = jax.device_put(good_scale, good_scale.sharding)
    state, _ = trainer.step(state, trainer.put(random_rows(8, 16, seed=9)))
    assert (int(state.skipped), int(state.skipped_in_row)) == (2, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host(state.params)))


def test_a_gradient_that_overflows_is_skipped_although_the_loss_is_finite():
    """Norm of a gradient of 1e30 entries: its square overflows float32."""
    from posttrain_jax.core.optim import OptimOptions, make_optimizer
    from posttrain_jax.core.updates import apply_gradients, new_state

    rule = make_optimizer(OptimOptions(name="adamw"), lambda step: jnp.float32(0.1))
    state = new_state({"w": jnp.ones(3)}, {}, jax.random.key(0), rule, ema=True)
    new, metrics = apply_gradients(
        state, {"w": jnp.full(3, 1e30)}, jnp.float32(1.0), optimizer=rule, ema_decay=0.5
    )
    assert int(new.skipped) == 1
    np.testing.assert_array_equal(new.params["w"], 1.0)
    assert np.isinf(metrics["train/grad_norm"].sum)


def test_ema_is_the_moving_average_by_hand():
    """ema_0 = params_0; ema_t = 0.8 ema_{t-1} + 0.2 params_t."""
    trainer = make_trainer(make_mesh(*ONE), ema=0.8)
    state = trainer.state
    average = host(state.params)
    for step in range(4):
        state, _ = trainer.step(state, trainer.put(random_rows(8, 16, seed=step)))
        average = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, average, host(state.params))
    assert worst_difference(host(state.ema), average) < 1e-6
    assert worst_difference(host(state.ema), host(state.params)) > 1e-3


# Learning rates that suit each optimizer on this model.
RATES = {"adamw": 1e-2, "adafactor": 1e-2, "lion": 1e-2, "rmsprop": 1e-3, "sgd": 1e-1, "adam_tf": 1e-2}


def falls(optimizer: str, schedule: str) -> None:
    trainer = make_trainer(make_mesh(*ONE), optimizer=optimizer, schedule=schedule, lr=RATES[optimizer])
    state, batch, losses = trainer.state, trainer.put(random_rows(8, 16)), []
    for _ in range(30):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["train/loss"].sum / metrics["train/loss"].count))
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(optimizer):
    falls(optimizer, "constant")


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "constant"])
def test_every_schedule_learns(schedule):
    falls("adamw", schedule)


def test_schedules_by_hand():
    """lr 1, 20 steps, 4 of warm-up, floor 0.1: u = (t - 4) / 16."""

    def at(name, step, **options):
        return float(
            make_schedule(
                OptimOptions(schedule=name, lr=1.0, warmup=4, min_lr_ratio=0.1, **options), steps=20
            )(jnp.int32(step))
        )

    for name in SCHEDULES:
        assert [at(name, t) for t in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0]), name
    assert at("constant", 19) == 1.0
    assert at("linear", 12) == pytest.approx(1 - 0.9 * 0.5)
    assert at("cosine", 12) == pytest.approx(0.1 + 0.9 * 0.5)
    assert at("linear", 20) == pytest.approx(0.1)
    assert at("cosine", 20) == pytest.approx(0.1)
    assert at("wsd", 12, decay_share=0.25) == pytest.approx(1.0)
    assert at("wsd", 18, decay_share=0.25) == pytest.approx(1 - 0.9 * 0.5)
    assert at("wsd", 20, decay_share=0.25) == pytest.approx(0.1)
    share = make_schedule(OptimOptions(schedule="constant", lr=1.0, warmup=0.1), steps=20)
    assert [float(share(jnp.int32(t))) for t in range(3)] == pytest.approx([0.5, 1.0, 1.0])


def test_weight_decay_spares_norms():
    """SGD on the same rows with and without: matrices are less by lr * decay times what they were, norms are equal."""
    rows, after = random_rows(8, 16), {}
    for decay in (0.0, 0.5):
        trainer = make_trainer(make_mesh(*ONE), optimizer="sgd", lr=0.1, weight_decay=decay, clip_norm=0.0)
        before = host(trainer.state.params)
        state, metrics = trainer.step(trainer.state, trainer.put(rows))
        after[decay] = host(state.params)
    rate = float(metrics["train/lr"].sum)
    np.testing.assert_array_equal(after[0.5]["final_norm"]["scale"], after[0.0]["final_norm"]["scale"])
    np.testing.assert_allclose(
        after[0.5]["embed"]["embedding"],
        after[0.0]["embed"]["embedding"] - rate * 0.5 * before["embed"]["embedding"],
        rtol=1e-5,
        atol=1e-7,
    )
