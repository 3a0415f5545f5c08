"""A model that is to be trained, before its weights are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.sharding import tree_shardings
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import Array, PyTree, TrainState
from posttrain_jax.core.updates import new_state
from posttrain_jax.models.config import LoraConfig
from posttrain_jax.models.io.export import write_model_folder
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.io.source import Source, has_adapter
from posttrain_jax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The model to train, before its weights are read.

    Attributes:
      model: the transformer, LoRA adapters included.
      tokenizer: with the chat template in place.
      source: where the weights come from; None = random.
      original, generation: the config.json and generation_config.json that the model came with; None and {} without.
    """

    model: Model
    tokenizer: PreTrainedTokenizerBase
    source: Source | None
    original: dict[str, Any] | None
    generation: dict[str, Any]

    def init_params(self, mesh: Mesh, key: Array) -> PyTree:
        """Reads (or draws) the parameters straight into their places on the mesh; new LoRA leaves are drawn."""
        shardings = tree_shardings(self.model.abstract_params(), mesh)
        if self.source is None:
            with jax.set_mesh(mesh):
                return jax.jit(self.model.init, out_shardings=shardings)(key)
        loaded = load_model(self.source, mesh=mesh)
        if loaded.source.weights == "ema":
            log_on_host0(
                f"model.init={self.source.name}: the moving average of its weights is read (its eval.weights)."
            )
        if loaded.lora.rank and not self.model.lora.rank:
            raise InputError(
                f"model.init={self.source.name} has a LoRA adapter; merge it first "
                "(python -m launch.export), or set model.lora.rank to train an adapter."
            )
        if loaded.lora.rank and _in_order(loaded.lora) != _in_order(self.model.lora):
            raise InputError(
                f"model.init={self.source.name} has a LoRA adapter of {_lora_text(loaded.lora)}, and the config says "
                f"{_lora_text(self.model.lora)}; set model.lora to the adapter's, or merge it first (python -m "
                "launch.export)."
            )
        if not self.model.lora.rank or loaded.lora.rank:
            return loaded.params

        def adapters(key: Array) -> PyTree:
            return partition(self.model.init(key), is_adapter)[0]

        places = partition(shardings, is_adapter)[0]
        with jax.set_mesh(mesh):
            return combine(loaded.params, jax.jit(adapters, out_shardings=places)(key))

    def require_new_adapter(self, what: str) -> None:
        """For what takes the parameters without their adapter to be those that training starts from.

        Raises:
          InputError: `model.init` has an adapter already.
        """
        if self.source is not None and has_adapter(self.source):
            raise InputError(
                f"{what} needs an adapter that starts at zero, and model.init={self.source.name} has one that was "
                "trained; merge it first (python -m launch.export)."
            )

    @property
    def has_new_adapter(self) -> bool:
        """Whether it has a LoRA adapter that training starts at zero."""
        return bool(self.model.lora.rank) and not (self.source is not None and has_adapter(self.source))

    def describe(self, folder: Path, *, reward: bool = False) -> None:
        """Writes config.json, tokenizer, chat template and generation config: what export and chat need.

        Args:
          reward: the run trains a reward model, so its checkpoints hold a `score_head`.
        """
        write_model_folder(
            folder,
            config=self.model.config,
            tokenizer=self.tokenizer,
            original=self.original,
            generation=self.generation,
            reward=reward,
        )


def _in_order(lora: LoraConfig) -> LoraConfig:
    return dataclasses.replace(lora, targets=tuple(sorted(lora.targets)))


def _lora_text(lora: LoraConfig) -> str:
    return f"rank {lora.rank}, alpha {lora.alpha:g}, rslora {lora.rslora}, targets {' '.join(sorted(lora.targets))}"


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter."""
    return path.endswith(("lora_a", "lora_b"))


def is_trained(path: str, model: Model) -> bool:
    """Whether a parameter is trained: every one, or with LoRA the adapters alone."""
    return not model.lora.rank or is_adapter(path)


def init_state(
    params: PyTree,
    key: Array,
    *,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
) -> TrainState:
    """Splits the parameters into trained and frozen and makes the optimizer's state."""
    trained, frozen = partition(params, lambda path: is_trained(path, model))
    return new_state(trained, frozen, key, optimizer, ema=ema_decay > 0)
