"""Held-out loss against sums done by hand in NumPy over the full logits."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.data.packing import pack
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.evaluate.held_out import SequenceLosses, estimates, held_out_loss
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.transformer import make_model

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=260,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=128,
    query_scale=8**-0.5,
    logits_softcap=8.0,
)
ANSWERS = ("yes", "no, never", "a longer answer than the others", "ok", "so it is")


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    params = model.init(jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"] * 20.0
    return params


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"question {i}? ", "completion": answer} for i, answer in enumerate(ANSWERS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build(str(path), byte_tokenizer(), TokenizeOptions(max_length=64), cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def by_hand(model, params, data):
    """(summed loss, trained tokens, correct tokens, tokens) of each sequence, one forward pass each."""
    table = []
    for i in range(len(data)):
        encoded = data.sources[0].sequence(i)
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(encoded.tokens)] = encoded.tokens
        logits = np.asarray(model.apply(params, jnp.asarray(tokens)).logits_BTV[0], np.float64)
        logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        places = [t for t in range(1, len(encoded.tokens)) if encoded.loss_mask[t]]
        loss = -sum(logps[t - 1, encoded.tokens[t]] for t in places)
        correct = sum(int(logits[t - 1].argmax() == encoded.tokens[t]) for t in places)
        table.append((loss, len(places), correct, len(encoded.tokens)))
    return np.asarray(table)


@pytest.mark.parametrize("packed", [True, False])
def test_numbers_are_those_of_numpy(model, params, data, by_hand, packed):
    rows = pack(data, 64, packed=packed)
    result = held_out_loss(model, params, rows, batch_rows=2)
    loss, trained, correct, length = by_hand.T
    values = {name: estimate.value for name, estimate in result.metrics.items()}
    expected = {
        "loss_per_token": loss.sum() / trained.sum(),
        "perplexity_per_token": np.exp(loss.sum() / trained.sum()),
        "token_accuracy": correct.sum() / trained.sum(),
        "loss_per_sequence": loss.mean(),
        "mean_loss_per_sequence": (loss / trained).mean(),
        "perplexity_per_sequence": np.exp((loss / trained).mean()),
    }
    assert values.keys() == expected.keys()
    for name in expected:
        assert values[name] == pytest.approx(expected[name], rel=1e-4), name
    assert result.counts() == {
        "tokens": length.sum(),
        "trained_tokens": trained.sum(),
        "sequences": 5,
        "rows": len(rows[0]),
    }
    assert len(rows[0]) < 5 or not packed
    # Packing puts the sequences in another order; the names go with them.
    lines = [int(name.rsplit(":", 1)[1]) - 1 for name in result.per_sequence.names]
    assert sorted(lines) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(result.per_sequence.loss_S, loss[lines], rtol=1e-4)
    np.testing.assert_array_equal(result.per_sequence.trained_S, trained[lines])
    np.testing.assert_array_equal(result.per_sequence.length_S, length[lines])


def test_a_mesh_changes_nothing(model, params, data, by_hand):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = jax.device_put(params, tree_shardings(params, mesh))
    done = []
    result = held_out_loss(
        model,
        sharded,
        pack(data, 64),
        batch_rows=3,  # rounded up to 4, the rows' shards
        mesh=mesh,
        bootstrap=0,
        progress=lambda *counts: done.append(counts),
    )
    assert result.metrics["loss_per_token"].value == pytest.approx(
        by_hand[:, 0].sum() / by_hand[:, 1].sum(), rel=1e-4
    )
    assert done == [(1, 1)]


def test_an_interval_has_the_width_that_theory_gives():
    """1,000 sequences of one token with losses 0 or 2, half and half: mean 1, standard error 1 / sqrt(1000), so
    the 95 % interval is 1 +- 1.96 * 0.0316 = 1 +- 0.062."""
    losses = SequenceLosses(
        names=[""] * 1000,
        loss_S=np.tile([0.0, 2.0], 500),
        trained_S=np.ones(1000, np.int64),
        correct_S=np.tile([1, 0], 500),
        length_S=np.full(1000, 3),
    )
    found = estimates(losses, bootstrap=2000, seed=1)
    loss = found["loss_per_token"]
    assert loss.value == 1.0
    assert loss.low == pytest.approx(1 - 0.062, abs=0.008)
    assert loss.high == pytest.approx(1 + 0.062, abs=0.008)
    assert found["token_accuracy"].value == 0.5
    assert found["perplexity_per_token"].high == pytest.approx(np.exp(loss.high), rel=1e-3)
    assert estimates(losses, bootstrap=2000, seed=1) == found
    assert estimates(losses, bootstrap=2000, seed=2) != found


def test_tokens_of_one_sequence_are_not_counted_as_independent():
    """Ten sequences of 1,000 tokens: the interval is that of ten numbers, not of ten thousand."""
    losses = SequenceLosses(
        names=[""] * 10,
        loss_S=np.asarray([1000.0, 3000.0] * 5),
        trained_S=np.full(10, 1000),
        correct_S=np.zeros(10, np.int64),
        length_S=np.full(10, 1000),
    )
    loss = estimates(losses, bootstrap=1000, seed=0)["loss_per_token"]
    assert loss.value == 2.0 and loss.low < 1.6 and loss.high > 2.4


def test_a_loss_that_is_not_finite_is_named(model, params, data):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(InputError, match=r"5 of 5 sequences is not finite.*rows\.jsonl:"):
        held_out_loss(model, broken, pack(data, 64))
    with pytest.raises(InputError, match="batch_rows is 0"):
        held_out_loss(model, params, pack(data, 64), batch_rows=0)
