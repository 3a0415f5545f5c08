"""Matrix products as XLA's CPU backend runs them fastest; on other backends they are plain products.

The gradients are written by hand, so that their products are those that the CPU is given.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core.types import Array

# From so many rows on, an adapter is cheaper added to its kernel than as a product of every row, and kernels are read
# as they are stored.
MANY_ROWS = 512


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x `[..., in]` times kernel `[in, out]`.

    The gradient is written by hand for XLA's CPU backend: without the barrier it fuses the transpose that the kernel's
    gradient needs into the element-wise work before it, and writes it with a stride (a quarter of a whole training
    step, experiments/LOG.md).
    """
    return x @ kernel


def _matmul_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_bwd(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    if jax.default_backend() == "cpu":
        x, d_y = jax.lax.optimization_barrier((x, d_y))
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_kernel = jnp.einsum("nd,nf->df", rows, d_rows, preferred_element_type=jnp.float32)
    return (d_rows @ kernel.T).reshape(x.shape), d_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lora_matmul(x: Array, kernel: Array, lora_a: Array, lora_b: Array, scale: float) -> Array:
    """x (W + scale A B): the adapter is added to the kernel, not its product to every token's output.

    With many rows that is one large product, and no element-wise pass more than without an adapter, forward and
    backward; the gradients of A and B go through rows of width rank (arXiv:2106.09685, section 4). Exact in float32;
    in bfloat16 the sum would round small adapters away.
    """
    return x @ (kernel + scale * (lora_a @ lora_b))


def _lora_matmul_fwd(x, kernel, lora_a, lora_b, scale):
    return lora_matmul(x, kernel, lora_a, lora_b, scale), (x, kernel, lora_a, lora_b)


def _lora_matmul_bwd(scale, residuals, d_y):
    x, kernel, lora_a, lora_b = residuals
    d_x, d_kernel = _matmul_bwd((x, kernel + scale * (lora_a @ lora_b)), d_y)
    if jax.default_backend() == "cpu":
        x, d_y = jax.lax.optimization_barrier((x, d_y))
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_a = scale * jnp.einsum("nd,nr->dr", rows, d_rows @ lora_b.T)
    d_b = scale * jnp.einsum("nr,nf->rf", rows @ lora_a, d_rows)
    return d_x, d_kernel, d_a, d_b


lora_matmul.defvjp(_lora_matmul_fwd, _lora_matmul_bwd)


def few_rows(x: Array) -> bool:
    """Whether `few_rows_matmul` is the faster product for x `[..., in]` on this backend."""
    return jax.default_backend() == "cpu" and x.size // x.shape[-1] < MANY_ROWS


def few_rows_matmul(x: Array, kernel_out_in: Array, out_dtype: Any = None) -> Array:
    """x `[..., in]` times the kernel `[out, in]`, transposed; `out_dtype` None = that of the arguments.

    For a few rows XLA's CPU backend is fastest with the weights on the left (8 rows: 22 against 32 ms for the MLPs of
    SmolLM2-135M, experiments/LOG.md); without the barriers it would swap the two sides.
    """
    rows_IN = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    product = jnp.matmul(kernel_out_in, rows_IN, preferred_element_type=out_dtype)
    return jax.lax.optimization_barrier(product).T.reshape(*x.shape[:-1], -1)


def computed_once(tables: tuple[Array, Array]) -> tuple[Array, Array]:
    """The same tables, but XLA's CPU backend computes them once: it would fuse their cosines into every layer that
    reads them, but it fuses a product, here with the identity, into nothing (experiments/LOG.md)."""
    if jax.default_backend() != "cpu":
        return tables
    cos, sin = (table @ jnp.eye(table.shape[-1], dtype=table.dtype) for table in tables)
    return cos, sin
