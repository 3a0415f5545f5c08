"""The loss of supervised fine-tuning, by hand and against transformers' own."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses.sft import nll_loss


def test_by_hand():
    """Tokens with p = 1/2, 1/4 and (masked) 1/8: losses ln 2, ln 4 and 0; mean (ln 2 + ln 4) / 2 = 1.5 ln 2."""
    logps = jnp.log(jnp.array([[0.5, 0.25, 0.125]]))
    loss = nll_loss(logps, jnp.array([[1, 1, 0]]))
    np.testing.assert_allclose(loss.loss, [[math.log(2), math.log(4), 0.0]], rtol=1e-6)
    assert loss.count == 2
    np.testing.assert_allclose(loss.loss.sum() / loss.count, 1.5 * math.log(2), rtol=1e-6)


def test_fully_masked_row_counts_nothing_even_if_nan():
    loss = nll_loss(jnp.array([[jnp.nan, -1.0]]), jnp.array([[0, 1]]))
    np.testing.assert_allclose(loss.loss, [[0.0, 1.0]])
    assert loss.count == 1


def test_long_answers_weigh_by_tokens_not_by_rows():
    """Rows of 1 and 3 trained tokens with losses 4 and 0: per token the mean is 1, a mean of means would be 2."""
    logps = jnp.array([[-4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = nll_loss(logps, jnp.array([[1, 0, 0], [1, 1, 1]]))
    assert loss.loss.sum() / loss.count == 1.0


def test_equals_transformers():
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [parity])")
    from transformers.loss.loss_utils import ForCausalLMLoss

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 11)).astype(np.float32)
    tokens = rng.integers(0, 11, (2, 6))
    mask = rng.random((2, 6)) < 0.5
    mask[:, 0] = False
    labels = np.where(mask, tokens, -100)
    want = ForCausalLMLoss(
        torch.tensor(logits), torch.tensor(labels), 11, num_items_in_batch=torch.tensor(mask.sum())
    )
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logps[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    loss = nll_loss(jnp.asarray(picked), jnp.asarray(mask[:, 1:].astype(np.int32)))
    np.testing.assert_allclose(loss.loss.sum() / loss.count, want.item(), rtol=1e-6)
