"""Packed rows of pretraining text, which PPO-ptx learns from beside the policy's completions (InstructGPT,
arXiv:2203.02155, eq. 2 and appendix C.4), and which keeps what RLHF would make the model forget."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
from jax.sharding import Mesh

from posttrain_jax.algorithms.contract import TextOptions
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.sharding import host_data_shards, put_batch
from posttrain_jax.data.loader import Loader
from posttrain_jax.data.packing import pack
from posttrain_jax.data.rows import ColumnNames
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.models.spec import ModelSpec
from posttrain_jax.run.batches import RowBatches
from posttrain_jax.wiring.data import chat_options, data_spec
from posttrain_jax.wiring.experiment import OnlineExperiment


def text_batches(
    text: TextOptions,
    experiment: OnlineExperiment,
    policy: ModelSpec,
    mesh: Mesh,
    workdir: Path,
    *,
    minibatches: int,
) -> RowBatches:
    """An iteration's rows as a `Batch` `[M, B, T]`; M is a multiple of the minibatches, each of which has its share.

    Raises:
      InputError: no data, rows that do not divide, rows that are too long for the policy.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if text.rows <= 0 or text.rows % (minibatches * shards):
        raise InputError(
            f"ppo.ptx_rows is {text.rows}; each of ppo.minibatches={minibatches} has its own rows, split over "
            f"mesh.data x mesh.fsdp = {shards}: make it a multiple of {minibatches * shards}."
        )
    if text.length > policy.model.config.max_length:
        raise InputError(
            f"ppo.ptx_length is {text.length}, and the policy was made for {policy.model.config.max_length} tokens; "
            "lower it."
        )
    options = TokenizeOptions(
        max_length=text.length,
        truncate="right",
        train_on="all_turns",
        chat=chat_options(experiment.data, policy.tokenizer, workdir),
        on_bad_row=experiment.data.on_bad_row,
        columns=ColumnNames(ignored=experiment.data.ignore_columns),
        progress=jax.process_index() == 0,
    )
    data = build(
        data_spec(text.data),
        policy.tokenizer,
        options,
        rejected_path=workdir / "rejected-ptx.jsonl",
    )
    log_on_host0(data.text())
    part = text.rows // minibatches
    most = experiment.train.micro_rows or part
    micro = max((n for n in range(shards, part + 1, shards) if part % n == 0 and n <= most), default=shards)
    host, hosts = host_data_shards(mesh)
    loader = Loader(
        pack(data, text.length, packed=True),
        rows_per_step=text.rows,
        seed=experiment.seed,
        host_index=host,
        host_count=hosts,
    )
    return RowBatches(loader, functools.partial(put_batch, mesh=mesh, micro_batches=text.rows // micro))
