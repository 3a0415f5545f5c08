"""Attention on TPUs: JAX's Pallas splash attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import BATCH_AXES, ambient_mesh, tensor_axis
from posttrain_jax.core.types import Array
from posttrain_jax.models.attention_mask import AttentionMask
from posttrain_jax.models.config import ModelConfig

SPLASH_LANES = 128


def attend_splash(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    mask: AttentionMask,
    is_local: Array,
    config: ModelConfig,
    *,
    interpret: bool = False,
) -> Array:
    """Pallas splash attention for TPU: blocks that the causal or local mask empties are never computed.

    Its window counts indices in the row, which are positions within a packed segment. Head widths that
    are no multiple of the TPU's 128 lanes are padded with zeros.
    """
    time, width = q_BTHK.shape[1], q_BTHK.shape[3]
    if mask.branches_BT is not None:
        raise InputError(
            "model.attention=splash cannot share a prompt between completions; set data.share_prompt=no, or "
            "model.attention=xla."
        )
    if time % SPLASH_LANES:
        raise InputError(
            f"model.attention=splash needs rows of a multiple of {SPLASH_LANES} tokens, but they have {time}; "
            "change data.max_length or use model.attention=xla."
        )
    padding = [(0, 0), (0, 0), (0, 0), (0, -width % SPLASH_LANES)]
    q_BHTK = jnp.pad(q_BTHK * config.query_scale, padding).transpose(0, 2, 1, 3)
    k_BGSK = jnp.pad(k_BSGK, padding).transpose(0, 2, 1, 3)
    v_BGSK = jnp.pad(v_BSGK, padding).transpose(0, 2, 1, 3)

    def run(window: int):
        kernel = functools.partial(
            _splash_rows, window=window, softcap=config.attn_softcap, interpret=interpret
        )
        mesh = ambient_mesh()
        if mesh is not None:
            rows = P(BATCH_AXES, tensor_axis(config.n_kv_heads, mesh), None, None)
            kernel = jax.shard_map(
                kernel,
                mesh=mesh,
                in_specs=(rows, rows, rows, P(BATCH_AXES, None)),
                out_specs=rows,
                check_vma=False,
            )
        return lambda: kernel(q_BHTK, k_BGSK, v_BGSK, mask.query_segments_BT)

    if not config.any_local:
        out_BHTK = run(0)()
    elif not config.any_global:
        out_BHTK = run(config.sliding_window)()
    else:
        out_BHTK = jax.lax.cond(is_local, run(config.sliding_window), run(0))
    return out_BHTK.transpose(0, 2, 1, 3)[..., :width]


def _splash_rows(
    q_BHTK: Array,
    k_BGSK: Array,
    v_BGSK: Array,
    segments_BT: Array,
    *,
    window: int,
    softcap: float,
    interpret: bool,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, time = q_BHTK.shape[1:3]
    shape = (time, time)
    rule = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    block = next(size for size in (512, 256, 128) if time % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([rule] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    return jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(
        q_BHTK, k_BGSK, v_BGSK, segments_BT
    )
