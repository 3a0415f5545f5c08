"""From the sections `model` and `mesh` to a mesh and a model whose weights are not read yet."""

from __future__ import annotations

import json
from typing import Any

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import MeshOptions, make_mesh
from posttrain_jax.data.chat_template import resolve_template
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.hf_config import config_from_hf
from posttrain_jax.models.io.source import Source, is_reward_model, load_config, resolve
from posttrain_jax.models.io.tokenizer import load_tokenizer
from posttrain_jax.models.options import ModelOptions
from posttrain_jax.models.spec import ModelSpec
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.wiring.experiment import Experiment


def mesh_of(options: MeshOptions) -> Mesh:
    """The mesh over all devices."""
    return make_mesh(data=options.data, fsdp=options.fsdp, tensor=options.tensor)


def define_model(experiment: Experiment, config: ModelConfig, lora: LoraConfig) -> Model:
    """A transformer as the experiment computes all of its models."""
    return make_model(
        config,
        dtype=experiment.model.dtype,
        attention=experiment.model.attention,
        remat=experiment.train.remat,
        lora=lora,
    )


def model_spec(experiment: Experiment, *, is_reward: bool = False) -> ModelSpec:
    """Resolves `model.init` and the tokenizer without reading weights.

    Args:
      experiment: what is trained.
      is_reward: a reward model is to be trained, so `model.init` may be one.

    Raises:
      InputError: the model or its tokenizer is not usable; says which key.
    """
    options = experiment.model
    source = None
    original: dict[str, Any] | None = None
    generation: dict[str, Any] = {}
    if options.init == "random":
        if not options.config:
            raise InputError(
                "model.init=random needs model.config: the fields of a Hugging Face config.json."
            )
        model_config = config_from_hf(options.config)
    else:
        source = resolve(options.init)
        if is_reward_model(source) and not is_reward:
            raise InputError(
                f"model.init={options.init} is a reward model, which has no vocabulary head to write with; "
                f"algorithm={experiment.algorithm} starts from a language model."
            )
        model_config = load_config(source)
        original, generation = _descriptions(source)
    tokenizer = _tokenizer(options, source, model_config)
    if experiment.data.chat_template:
        tokenizer.chat_template = resolve_template(tokenizer, experiment.data.chat_template)
    return ModelSpec(
        model=define_model(experiment, model_config, options.lora),
        tokenizer=tokenizer,
        source=source,
        original=original,
        generation=generation,
    )


def _descriptions(source: Source) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    if source.kind not in ("hf", "workdir"):
        return None, {}
    folder = source.model_folder
    read = {
        name: json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else None
        for name in ("config.json", "generation_config.json")
    }
    return read["config.json"], read["generation_config.json"] or {}


def _tokenizer(
    options: ModelOptions, source: Source | None, model_config: ModelConfig
) -> PreTrainedTokenizerBase:
    name = options.tokenizer
    if name == "bytes":
        tokenizer: PreTrainedTokenizerBase | None = byte_tokenizer()
    elif name:
        tokenizer = _tokenizer_of(resolve(name))
    elif source is not None:
        tokenizer = _tokenizer_of(source)
    else:
        raise InputError(
            'model.init=random needs model.tokenizer: a MODEL whose tokenizer to use, or "bytes".'
        )
    if tokenizer is None:
        raise InputError(f"{name or options.init} has no tokenizer; set model.tokenizer to a MODEL that has.")
    if len(tokenizer) > model_config.vocab_size:
        raise InputError(
            f"The tokenizer has {len(tokenizer)} tokens but the model's vocabulary is {model_config.vocab_size}; "
            "set model.tokenizer to the model's own."
        )
    return tokenizer


def _tokenizer_of(source: Source) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(source.path if source.kind == "gguf" else source.model_folder)
