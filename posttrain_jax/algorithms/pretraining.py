"""PPO-ptx: text of the kind that the model was pretrained on, learnt beside the answers (InstructGPT, arXiv:2203.02155,
eq. 2 and appendix C.4), which keeps what RLHF would make it forget."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config

from posttrain_jax.algorithms.sft import token_losses
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.sharding import host_data_shards
from posttrain_jax.core.types import Array, Batch, Metrics, PyTree
from posttrain_jax.data.loader import Loader
from posttrain_jax.data.packing import PackedRows, pack
from posttrain_jax.data.rows import ColumnNames
from posttrain_jax.data.tokenized import TokenizeOptions, build
from posttrain_jax.models.transformer import Model
from posttrain_jax.rollouts.experience import policy_params
from posttrain_jax.wiring.data import chat_from_config, data_spec
from posttrain_jax.wiring.experiment import ModelSpec


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """What is mixed in.

    Attributes:
      rows: packed text.
      rows_per_iteration: how many of them an iteration has; each of its minibatches has its own share.
      micro_batches: into how many parts all of an iteration's are cut, a multiple of the minibatches.
    """

    rows: list[PackedRows]
    rows_per_iteration: int
    micro_batches: int

    def loader(self, mesh: Mesh, seed: int) -> Loader:
        """This process's share of every iteration's rows."""
        index, count = host_data_shards(mesh)
        return Loader(
            self.rows, rows_per_step=self.rows_per_iteration, seed=seed, host_index=index, host_count=count
        )


def pretraining_from_config(
    config: Config, policy: ModelSpec, mesh: Mesh, workdir: Path, *, minibatches: int
) -> Pretraining | None:
    """What `ppo.ptx_*` names; None where the coefficient is 0.

    Raises:
      InputError: no data, rows that do not divide.
    """
    ppo = config.ppo
    if not ppo.ptx_coefficient:
        return None
    if not ppo.ptx_data:
        raise InputError("ppo.ptx_coefficient mixes pretraining text in, but ppo.ptx_data names none.")
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if ppo.ptx_rows <= 0 or ppo.ptx_rows % (minibatches * shards):
        raise InputError(
            f"ppo.ptx_rows is {ppo.ptx_rows}; each of ppo.minibatches={minibatches} has its own rows, split over "
            f"mesh.data x mesh.fsdp = {shards}: make it a multiple of {minibatches * shards}."
        )
    length = ppo.ptx_length or config.data.max_length
    if length > policy.model.config.max_length:
        raise InputError(
            f"ppo.ptx_length is {length}, and the policy was made for {policy.model.config.max_length} tokens; lower "
            "it."
        )
    options = TokenizeOptions(
        max_length=length,
        truncate="right",
        train_on="all_turns",
        chat=chat_from_config(config, policy.tokenizer, workdir),
        on_bad_row=config.data.on_bad_row,
        columns=ColumnNames(ignored=config.data.ignore_columns),
        progress=jax.process_index() == 0,
    )
    data = build(
        data_spec(ppo.ptx_data), policy.tokenizer, options, rejected_path=workdir / "rejected-ptx.jsonl"
    )
    log_on_host0(data.text())
    part = ppo.ptx_rows // minibatches
    most = config.train.micro_rows or part
    micro = max((n for n in range(shards, part + 1, shards) if part % n == 0 and n <= most), default=shards)
    return Pretraining(
        rows=pack(data, length, packed=True),
        rows_per_iteration=ppo.ptx_rows,
        micro_batches=ppo.ptx_rows // micro,
    )


def pretraining_losses(params: PyTree, batch: Batch, *, model: Model) -> tuple[Array, Metrics]:
    """Sum of the negative log-likelihoods of rows `[B, T]` (differentiable), and metrics.

    Args:
      params: whole; the value network's are left aside.
      batch: packed text.
      model: the policy.
    """
    total, _, metrics = token_losses(policy_params(params), batch, model=model)
    return total, {"pretraining_loss": metrics["loss"]}
