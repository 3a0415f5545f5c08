"""The scalar head of a reward model: its parameters, how it is made, and how it scores hidden states.

A reward model is the transformer without its vocabulary projection and with one leaf tree more, `score_head`:

    kernel  [D, 1] float32    gain  scalar float32    bias  scalar float32

    score = gain * (h @ kernel) + bias,   h = the final hidden state of the completion's last token

`gain` and `bias` are the normalization that is stored with the model (Ziegler et al. 2019, arXiv:1909.08593: rewards
of mean 0 and variance 1 under the initial policy; InstructGPT, arXiv:2203.02155, section 3.5: a bias alone, so that
demonstrations score 0 on average). A difference of two scores does not depend on `bias`. Neither is trained in a reward
model; of a value network's head the kernel and the bias are (see `wiring/online.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import Array, PyTree

INITS = ("normal", "zeros")


def score_head_params(key: Array, d_model: int, *, init: str) -> PyTree:
    """A new head with gain 1 and bias 0.

    Args:
      key: for "normal".
      d_model: D, the transformer's width.
      init: "normal", standard deviation 1 / sqrt(D + 1), for a reward model (lm-human-preferences; arXiv:2009.01325
        prints 1 / (D + 1), which its code does not do), or "zeros", for a value model.

    Raises:
      InputError: an unknown init.
    """
    if init not in INITS:
        raise InputError(f"The score head cannot be made by {init!r}; use {' or '.join(INITS)}.")
    shape = (d_model, 1)
    kernel = jnp.zeros(shape) if init == "zeros" else jax.random.normal(key, shape) / (d_model + 1) ** 0.5
    return {"kernel": kernel.astype(jnp.float32), "gain": jnp.float32(1), "bias": jnp.float32(0)}


def abstract_score_head(d_model: int) -> PyTree:
    """Shapes and dtypes of the head, without making it."""
    return jax.eval_shape(lambda: score_head_params(jax.random.key(0), d_model, init="zeros"))


def scores(head_params: PyTree, hidden_BTD: Array, last_token_index_BN: Array) -> Array:
    """Float32 scores `[B, N]` of N completions in each row.

    Only the hidden states of the last tokens are multiplied, in float32 whatever the compute dtype.

    Args:
      head_params: as `score_head_params` makes them.
      hidden_BTD: after the final norm, as `Model.apply` returns them.
      last_token_index_BN: int, in 0..T-1: the index of each completion's last token. Where a row has fewer completions,
        any index will do, and the caller masks the score.
    """
    last_BND = jnp.take_along_axis(hidden_BTD, last_token_index_BN[:, :, None], axis=1).astype(jnp.float32)
    products_BN = jnp.einsum(
        "bnd,d->bn",
        last_BND,
        head_params["kernel"][:, 0].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return head_params["gain"] * products_BN + head_params["bias"]


def fold_gain(head_params: PyTree) -> tuple[Array, float]:
    """The head as Hugging Face has it, a kernel alone: (gain * kernel `[D, 1]` float32, the remaining bias).

    With gain 1 the kernel stays the same, bit for bit.
    """
    kernel = head_params["gain"] * head_params["kernel"].astype(jnp.float32)
    return kernel, float(head_params["bias"])
