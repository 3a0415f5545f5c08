"""Loads a MODEL: its parameters, its tokenizer, and the transformer that they belong to.

`source.resolve` finds out what a MODEL is; `export.export_hf` writes one. A Hugging Face `...ForSequenceClassification`
with one label, and the workdir of a reward model, are reward models: their parameters hold a `score_head` (see
`models/reward_head.py`) and no vocabulary projection. `require_score_head` and `require_language_model` refuse one kind
where the other is needed. A workdir can hold an ensemble of reward models; `load_members` loads them one by one.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from posttrain_jax.core.checkpoint_params import restore_params, saved_parameters
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh, tree_shardings
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import Array, ModelOutput, PyTree
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.gguf import load_gguf
from posttrain_jax.models.io.hf_config import read_json
from posttrain_jax.models.io.hf_weights import load_safetensors
from posttrain_jax.models.io.peft import load_adapter
from posttrain_jax.models.io.source import (
    Source,
    base_of,
    evaluates_average,
    is_reward_model,
    load_config,
    member_count,
    resolve,
    workdir_lora,
)
from posttrain_jax.models.io.tokenizer import load_tokenizer, stop_token_ids
from posttrain_jax.models.reward_head import abstract_score_head
from posttrain_jax.models.transformer import Model, make_model


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    Attributes:
      config: its sizes and options.
      params: its parameters (adapter leaves included, where it has an adapter; a `score_head`, where it is a reward
        model).
      tokenizer: None where the source has none.
      model: the transformer, as functions of the parameters.
      source: where it came from.
      original: the config.json that it came with, or None (GGUF).
      generation: the generation_config.json that it came with, or {}.
    """

    config: ModelConfig
    params: PyTree
    tokenizer: PreTrainedTokenizerFast | None
    model: Model
    source: Source
    original: dict[str, Any] | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The model's own stop tokens: its EOS and its end of turn."""
        return stop_token_ids(self.config, self.tokenizer)

    @property
    def lora(self) -> LoraConfig:
        """The adapter's configuration; rank 0 where there is none."""
        return self.model.lora

    def apply(
        self,
        params: PyTree,
        tokens_BT: Array,
        *,
        segment_ids_BT: Array | None = None,
        positions_BT: Array | None = None,
    ) -> ModelOutput:
        """Runs the model. `logits_BTV` is the full `[B, T, V]` float32 array (for notebooks and parity), or None for a
        reward model, whose scores `reward_head.scores` computes from `hidden_BTD`."""
        return self.model.apply(
            params,
            jnp.asarray(tokens_BT),
            segment_ids_BT=segment_ids_BT,
            positions_BT=positions_BT,
            logits="score_head" not in params,
        )


def require_score_head(loaded: LoadedModel) -> PyTree:
    """The head's parameters, of a reward model.

    Raises:
      InputError: it is a language model.
    """
    if "score_head" not in loaded.params:
        raise InputError(
            f"{loaded.source.name} has no score head, so it is a language model and no reward model; give the workdir "
            "of a reward model's run, or a Hugging Face ...ForSequenceClassification folder."
        )
    return loaded.params["score_head"]


def require_language_model(loaded: LoadedModel) -> None:
    """Refuses a reward model where tokens are to be generated.

    Raises:
      InputError: it is one.
    """
    if "score_head" in loaded.params:
        raise InputError(
            f"{loaded.source.name} is a reward model: it gives scores and cannot write; give a language model."
        )


def load_model(
    model: str | Source,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    mesh: Mesh | None = None,
    attention: str = "auto",
    ema: bool | None = None,
) -> LoadedModel:
    """Loads a MODEL.

    Args:
      model: a MODEL, or what `resolve` made of it.
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: what the parameters are stored as.
      mesh: the parameters are sharded on it as training shards them; None = whole on the default device.
      attention: see `make_model`.
      ema: of a workdir, the moving average of the weights (True) or the last ones (False); None = those that its run
        evaluates (`eval.weights`).

    Raises:
      InputError: anything wrong with the model, in one sentence; an ensemble, which `load_members` loads.
    """
    source = model if isinstance(model, Source) else resolve(model)
    if ema and source.kind != "workdir":
        raise InputError(f"{source.name} is no workdir, so it has no moving average of its weights.")
    if ema is None:
        ema = source.kind == "workdir" and evaluates_average(source.path)
    if source.kind == "adapter":
        return _load_adapter(source, dtype=dtype, param_dtype=param_dtype, mesh=mesh, attention=attention)
    count = member_count(source)
    if count:
        raise InputError(
            f"{source.name} holds an ensemble of {count} reward models, and one model is needed here; export one with "
            f"python -m launch.export --workdir={source.name} --member=0 (to {count - 1}) --out=FOLDER."
        )
    config = load_config(source)
    lora = workdir_lora(source.path) if source.kind == "workdir" else LoraConfig()
    definition = make_model(config, dtype=dtype, attention=attention, lora=lora)
    reward = is_reward_model(source)
    abstract = definition.abstract_params()
    if reward:
        abstract["score_head"] = abstract_score_head(config.d_model)
    if source.kind == "workdir":
        abstract |= _kept_head(source, reward)
    shardings = None if mesh is None else tree_shardings(abstract, mesh)
    if source.kind == "gguf":
        _, params = load_gguf(source.path, shardings, dtype=param_dtype)
    elif source.kind == "hf":
        params = load_safetensors(source.path, config, shardings, param_dtype, reward=reward)
    else:
        stored = {
            name: part if name == "score_head" else _stored_as(part, param_dtype)
            for name, part in abstract.items()
        }
        params, step = restore_params(source.path, stored, step=source.step, shardings=shardings, ema=ema)
        source = dataclasses.replace(source, step=step, weights="ema" if ema else "raw")
        if reward:
            params.pop("head", None)
    tokenizer = load_tokenizer(source.path if source.kind == "gguf" else source.model_folder)
    if source.kind == "gguf":
        return LoadedModel(config, params, tokenizer, definition, source)
    original, generation = _descriptions(source.model_folder)
    return LoadedModel(config, params, tokenizer, definition, source, original, generation)


def load_language_model(model: str, *, dtype: str, fsdp: int = 1, tensor: int = 1) -> LoadedModel:
    """Loads a MODEL for generation on all devices, its weights in the compute dtype.

    Args:
      model: a MODEL.
      dtype: "float32" or "bfloat16".
      fsdp, tensor: sizes of these mesh axes; the data axis takes the rest of the devices.

    Raises:
      InputError: as `load_model`; a reward model; devices that these sizes do not divide.
    """
    single = (jax.device_count(), fsdp, tensor) == (1, 1, 1)
    mesh = None if single else make_mesh(data=-1, fsdp=fsdp, tensor=tensor)
    loaded = load_model(model, dtype=dtype, param_dtype=dtype, mesh=mesh)
    require_language_model(loaded)
    return loaded


def load_members(
    model: str | Source,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    mesh: Mesh | None = None,
    attention: str = "auto",
    ema: bool | None = None,
) -> list[LoadedModel]:
    """Loads the reward models of an ensemble; of any other reward model, a list with that one.

    What the members share (the trunk, where they are LoRA adapters) is in memory once. Arguments are those of
    `load_model`.

    Raises:
      InputError: anything wrong with the model, in one sentence; a language model.
    """
    source = model if isinstance(model, Source) else resolve(model)
    count = member_count(source)
    if not count:
        single = load_model(
            source, dtype=dtype, param_dtype=param_dtype, mesh=mesh, attention=attention, ema=ema
        )
        require_score_head(single)
        return [single]
    if ema is None:
        ema = evaluates_average(source.path)
    config = load_config(source)
    definition = make_model(config, dtype=dtype, attention=attention, lora=workdir_lora(source.path))
    saved = saved_parameters(source.path, step=source.step)
    body = {name: part for name, part in definition.abstract_params().items() if name != "head"}
    own, shared = partition(
        {**_stored_as(body, param_dtype), "score_head": abstract_score_head(config.d_model)},
        lambda path: f"members/{path}" in saved,
    )
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), own)
    stored = {**shared, "members": stacked}
    params, step = restore_params(
        source.path,
        stored,
        step=source.step,
        shardings=None if mesh is None else tree_shardings(stored, mesh),
        ema=ema,
    )
    members = params.pop("members")
    source = dataclasses.replace(source, step=step, weights="ema" if ema else "raw")
    tokenizer = load_tokenizer(source.model_folder)
    original, generation = _descriptions(source.model_folder)
    loaded = []
    for number in range(count):
        part = jax.tree.map(lambda leaf, n=number: leaf[n], members)
        if mesh is not None:
            part = jax.device_put(part, tree_shardings(part, mesh))
        loaded.append(
            LoadedModel(config, combine(part, params), tokenizer, definition, source, original, generation)
        )
    return loaded


def _descriptions(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of config.json and generation_config.json; {} for the second where there is none."""
    generation = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation) if generation.is_file() else {}


def _stored_as(tree: PyTree, dtype: str) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def _kept_head(source: Source, reward: bool) -> PyTree:
    """Shapes of the vocabulary projection that the checkpoints of a reward model may still hold, or {}.

    Raises:
      InputError: a workdir's description and its checkpoints do not agree on what the model is.
    """
    saved = saved_parameters(source.path, step=source.step)
    if saved and ("score_head/kernel" in saved) != reward:
        raise InputError(
            f"{source.path}: the checkpoints {'lack a' if reward else 'hold a'} score head but model/config.json "
            f"says that this is a {'reward' if reward else 'language'} model; they are not of one run."
        )
    if not reward or "head/kernel" not in saved:
        return {}
    return {"head": {"kernel": jax.ShapeDtypeStruct(saved["head/kernel"], jnp.float32)}}


def _load_adapter(
    source: Source, *, dtype: str, param_dtype: str, mesh: Mesh | None, attention: str
) -> LoadedModel:
    """A PEFT adapter on its base model, not merged."""
    base = load_model(base_of(source), dtype=dtype, param_dtype=param_dtype, mesh=mesh, attention=attention)
    if base.lora.rank:
        raise InputError(
            f"{source.name}: its base model {base.source.name} has an adapter itself; merge that first."
        )
    lora, leaves = load_adapter(source.path, base.config)
    return dataclasses.replace(
        base,
        params=combine(base.params, leaves),
        tokenizer=load_tokenizer(source.path) or base.tokenizer,
        model=make_model(base.config, dtype=dtype, attention=attention, lora=lora),
        source=source,
    )
