"""Packed rows by hand and against the model alone, and which parameters are the reference's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.tiny import LLAMA, make_mesh, params_of

from posttrain_jax.core.types import TrainState
from posttrain_jax.forward.packed_rows import map_rows, pack_indices, packed_rows, scatter
from posttrain_jax.forward.reference import ReferencePolicy, row_logps
from posttrain_jax.models.transformer import make_model

MODEL = make_model(LLAMA, remat="none", attention="xla")


def test_packed_rows_by_hand():
    """Two trajectories of 3 and 2 tokens, N = 2 and S = 4, in a row of 6: token t is predicted at t - 1, and numbers
    come back to the token that they are of."""
    tokens = np.asarray([[10, 11, 12, 0], [20, 21, 0, 0]], np.int32)
    mask = np.asarray([[0, 1, 1, 0], [0, 1, 0, 0]], np.int32)
    indices = pack_indices(
        np.asarray([3, 2]), np.arange(2), length=4, row_length=6, micro_batches=1, micro_rows=1
    )[0]
    assert indices.tolist() == [[0, 1, 2, 4, 5, 8]]
    rows = packed_rows(jnp.asarray(indices), jnp.asarray(tokens), jnp.asarray(mask))
    assert rows.tokens.tolist() == [[10, 11, 12, 20, 21, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert rows.mask.tolist() == [[1, 1, 0, 1, 0, 0]]
    assert rows.targets[0, :2].tolist() == [11, 12] and rows.targets[0, 3] == 21
    values = jnp.asarray([[1.0, 2.0, 9.0, 3.0, 9.0, 9.0]])
    assert rows.sums(values).tolist() == [3.0, 3.0] and rows.present().tolist() == [True, True]
    back = scatter(values, rows.indices, rows.mask, tokens.shape)
    assert back.tolist() == [[0, 1, 2, 0], [0, 3, 0, 0]]
    assert rows.at_targets(back).tolist() == [[1, 2, 0, 3, 0, 0]]
    jax.tree.map(np.testing.assert_array_equal, packed_rows(indices, tokens, mask, np), rows)


def test_log_probabilities_stand_at_the_token_before():
    """Trajectories of 5, 3 and 4 tokens in rows of 8, in two micro-batches, against each alone in a row of its own."""
    mesh = make_mesh(1, 1, 1)
    params = params_of(MODEL, mesh)
    rng = np.random.default_rng(0)
    lengths = np.asarray([5, 3, 4])
    real = np.arange(6) < lengths[:, None]
    tokens = np.where(real, rng.integers(1, 64, (3, 6)), 0).astype(np.int32)
    mask = ((np.arange(6) >= 2) & real).astype(np.int32)
    indices = pack_indices(lengths, np.arange(3), length=6, row_length=8, micro_batches=2, micro_rows=1)
    assert [np.unique(row[row < 18] // 6).tolist() for row in indices[:, 0]] == [[0, 1], [2]]
    logps = map_rows(row_logps(MODEL, 0.7, mesh), params, tokens, mask, indices, mesh)
    alone = jax.jit(lambda row: jax.nn.log_softmax(MODEL.apply(params, row).logits_BTV[0] / 0.7))
    for number, length in enumerate(lengths.tolist()):
        want = alone(jnp.asarray(tokens[number, :length])[None])
        for t in range(2, length):
            assert logps[number, t - 1] == pytest.approx(float(want[t - 1, tokens[number, t]]), abs=1e-4)
    assert np.count_nonzero(logps) == mask.sum()


@pytest.mark.parametrize(
    ("kind", "held", "want"),
    [
        ("frozen", {"q": {"kernel": 5}}, {"q": {"kernel": 5}}),
        ("a/model", {"q": {"kernel": 6}}, {"q": {"kernel": 6}}),
        ("adapter", {}, {"q": {"kernel": 1}}),
        ("ema", {}, {"q": {"kernel": 1, "lora_a": 30, "lora_b": 40}}),
    ],
)
def test_the_parameters_of_a_reference(kind, held, want):
    """Of a policy with a frozen kernel 1 and an adapter 3, 4 whose average is 30, 40; the value network is left out."""
    zero = jnp.int32(0)
    state = TrainState(
        step=zero,
        params={"q": {"lora_a": 3, "lora_b": 4}, "value": {"kernel": 7}},
        frozen={"q": {"kernel": 1}},
        opt_state={},
        ema={"q": {"lora_a": 30, "lora_b": 40}, "value": {"kernel": 70}},
        key=jax.random.key(0),
        skipped=zero,
        skipped_in_row=zero,
    )
    assert ReferencePolicy(kind, MODEL, held).of_state(state) == want
