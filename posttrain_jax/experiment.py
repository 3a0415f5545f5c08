"""From a config to the pieces every algorithm needs: mesh, model, data, optimiser. Here ConfigDicts end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config
from transformers import PreTrainedTokenizerBase

from posttrain_jax.assets import fetch
from posttrain_jax.data.loader import Loader, RowSource
from posttrain_jax.data.packing import PackedRows, efficiency, pack
from posttrain_jax.data.preference_rows import RowShape, row_shape
from posttrain_jax.data.spans import resolve_template
from posttrain_jax.data.split import hold_out, split_amount
from posttrain_jax.data.tokenized import TokenizedData, TokenizeOptions, build
from posttrain_jax.data.tokenized_preferences import PreferenceData, build_preferences
from posttrain_jax.errors import InputError
from posttrain_jax.export_model import write_model_folder
from posttrain_jax.load_model import Source, load_config, load_model, resolve
from posttrain_jax.metrics import say
from posttrain_jax.models.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.hf_config import config_from_hf
from posttrain_jax.models.tokenizer import load_tokenizer
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.optim import make_optimizer, make_schedule, new_state
from posttrain_jax.sharding import host_data_shards, make_mesh, tree_shardings
from posttrain_jax.trees import combine, partition
from posttrain_jax.types import Array, PyTree, TrainState


def mesh_from_config(config: Config) -> Mesh:
    """The mesh that `config.mesh` names."""
    return make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model to train, before its weights are read.

    Attributes:
      model: the transformer, LoRA adapters included.
      tokenizer: with the chat template in place.
      source: where the weights come from; None = random.
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
        if loaded.lora.rank and not self.model.lora.rank:
            raise InputError(
                f"model.init={self.source.name} has a LoRA adapter; merge it first "
                "(python -m launch.export), or set model.lora.rank to train an adapter."
            )
        if not self.model.lora.rank or loaded.lora.rank:
            return loaded.params

        def adapters(key: Array) -> PyTree:
            return partition(self.model.init(key), lambda path: path.endswith(("lora_a", "lora_b")))[0]

        places = partition(shardings, lambda path: path.endswith(("lora_a", "lora_b")))[0]
        with jax.set_mesh(mesh):
            return combine(loaded.params, jax.jit(adapters, out_shardings=places)(key))

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


def policy_from_config(config: Config) -> Policy:
    """Resolves `config.model` without reading weights.

    Raises:
      InputError: the model, its tokenizer or an option is not usable; says which key.
    """
    lora = LoraConfig(
        rank=config.model.lora.rank,
        alpha=config.model.lora.alpha,
        targets=tuple(config.model.lora.targets),
        rslora=config.model.lora.rslora,
    )
    source = None
    original: dict[str, Any] | None = None
    generation: dict[str, Any] = {}
    if config.model.init == "random":
        model_config = _random_config(config)
    else:
        source = resolve(config.model.init)
        model_config = load_config(source)
        original, generation = _descriptions(source)
    model = make_model(
        model_config,
        dtype=config.model.dtype,
        attention=config.model.attention,
        remat=config.train.remat,
        lora=lora,
    )
    tokenizer = _tokenizer(config, source, model_config)
    if config.data.chat_template:
        tokenizer.chat_template = resolve_template(tokenizer, config.data.chat_template)
    return Policy(model=model, tokenizer=tokenizer, source=source, original=original, generation=generation)


def _random_config(config: Config) -> ModelConfig:
    fields = config.model.config.to_dict()
    if not fields:
        raise InputError("model.init=random needs model.config: the fields of a Hugging Face config.json.")
    return config_from_hf(fields)


def _descriptions(source: Source) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    if source.kind not in ("hf", "workdir"):
        return None, {}
    folder = source.model_folder
    read = {
        name: json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else None
        for name in ("config.json", "generation_config.json")
    }
    return read["config.json"], read["generation_config.json"] or {}


def _tokenizer(config: Config, source: Source | None, model_config: ModelConfig) -> PreTrainedTokenizerBase:
    name = config.model.tokenizer
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
        raise InputError(
            f"{name or config.model.init} has no tokenizer; set model.tokenizer to a MODEL that has."
        )
    if len(tokenizer) > model_config.vocab_size:
        raise InputError(
            f"The tokenizer has {len(tokenizer)} tokens but the model's vocabulary is {model_config.vocab_size}; "
            "set model.tokenizer to the model's own."
        )
    return tokenizer


def _tokenizer_of(source: Source) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(source.path if source.kind == "gguf" else source.model_folder)


def is_trained(path: str, model: Model) -> bool:
    """Whether a parameter is trained: every one, or with LoRA the adapters alone."""
    return not model.lora.rank or path.endswith(("lora_a", "lora_b"))


def init_state(
    params: PyTree,
    key: Array,
    *,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
) -> TrainState:
    """Splits the parameters into trained and frozen and makes the optimiser's state."""
    trained, frozen = partition(params, lambda path: is_trained(path, model))
    return new_state(trained, frozen, key, optimizer, ema=ema_decay > 0)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows to train and to evaluate on."""

    train: list[PackedRows]
    held_out: list[PackedRows]


def rows_from_config(config: Config, tokenizer: PreTrainedTokenizerBase, workdir: Path) -> Rows:
    """Reads, tokenises (or finds in the cache), splits and packs `config.data`, and says what it did.

    Raises:
      InputError: bad rows, a missing file, nothing left to train on.
    """
    options = TokenizeOptions(
        max_length=config.data.max_length,
        truncate=config.data.truncate,
        train_on=config.data.train_on,
        chat_template=config.data.chat_template,
        on_bad_row=config.data.on_bad_row,
    )
    train = build(data_spec(config.data.train), tokenizer, options, rejected_path=workdir / "rejected.jsonl")
    say(train.text())
    held_out: TokenizedData | None = None
    if config.data.eval:
        amount = split_amount(data_spec(config.data.eval))
        if amount is not None:
            train, held_out = hold_out(train, amount, seed=config.seed)
        else:
            held_out = build(data_spec(config.data.eval), tokenizer, options)
            say(held_out.text())
    rows = pack(train, config.data.max_length, packed=config.data.pack)
    evaluation = [] if held_out is None else pack(held_out, config.data.max_length, packed=config.data.pack)
    count = sum(len(part) for part in rows)
    say(
        f"{count} rows of {config.data.max_length} tokens to train on, {efficiency(rows):.1%} of the places "
        f"filled; {0 if held_out is None else len(held_out)} sequences held out."
    )
    return Rows(train=rows, held_out=evaluation)


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Preference data to train and to evaluate on, and the rows they are packed into.

    Attributes:
      train, held_out: `held_out` is None where data.eval is "".
      shape: of a step's rows.
      eval_shape: of an evaluation's rows (the same length).
    """

    train: PreferenceData
    held_out: PreferenceData | None
    shape: RowShape
    eval_shape: RowShape


def preferences_from_config(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    workdir: Path,
    *,
    attention: str,
    change: Callable[[PreferenceData], PreferenceData] = lambda data: data,
) -> Preferences:
    """Reads, tokenises (or finds in the cache) and splits the preferences of `config.data`, and says what it did.

    Args:
      config: the experiment.
      tokenizer: with its chat template.
      workdir: bad rows that are skipped are listed here.
      attention: the implementation that the model will use.
      change: what is done to the data after the split.

    Raises:
      InputError: bad rows, a missing file, nothing left to train on, a group that does not fit.
    """
    options = TokenizeOptions(
        max_length=config.data.max_length,
        truncate=config.data.truncate,
        chat_template=config.data.chat_template,
        on_bad_row=config.data.on_bad_row,
    )
    train = build_preferences(
        data_spec(config.data.train), tokenizer, options, rejected_path=workdir / "rejected.jsonl"
    )
    say(train.text())
    held_out: PreferenceData | None = None
    if config.data.eval:
        amount = split_amount(data_spec(config.data.eval))
        if amount is not None:
            train, held_out = hold_out(train, amount, seed=config.seed)
        else:
            held_out = build_preferences(data_spec(config.data.eval), tokenizer, options)
            say(held_out.text())
    train, held_out = change(train), None if held_out is None else change(held_out)
    parts = [train] if held_out is None else [train, held_out]
    share = share_prompt(config.data.share_prompt, attention)
    shape = row_shape(
        parts, groups=config.train.rows_per_step, length=config.data.row_length, share_prompt=share
    )
    eval_shape = row_shape(parts, groups=config.eval.batch_rows, length=shape.length, share_prompt=share)
    say(
        f"{len(train):,} prompts to train on, {0 if held_out is None else len(held_out):,} held out; "
        f"{config.train.rows_per_step} a step, packed into rows of {shape.length:,} tokens"
        + (", completions after a shared prompt." if share else ", every completion with its prompt.")
    )
    return Preferences(train=train, held_out=held_out, shape=shape, eval_shape=eval_shape)


def share_prompt(wanted: str, attention: str) -> bool:
    """Whether completions share their prompt: "auto" = wherever the attention implementation can.

    Raises:
      InputError: another word.
    """
    if wanted not in ("auto", "yes", "no"):
        raise InputError(f"data.share_prompt is {wanted!r}; use auto, yes or no.")
    return wanted == "yes" or (wanted == "auto" and attention != "splash")


def data_spec(value: Any) -> Any:
    """A data spec as `data.tokenized.build` takes it: a string, or (source, weight) pairs; `asset:NAME` is fetched."""
    if not isinstance(value, str):
        return [(data_spec(str(source)), float(weight)) for source, weight in value]
    return str(fetch(value.removeprefix("asset:"))) if value.startswith("asset:") else value


def loader_from_config(config: Config, rows: Sequence[RowSource], mesh: Mesh) -> Loader:
    """This process's share of the training rows.

    Raises:
      InputError: rows_per_step does not divide into micro-batches and devices; says which numbers would.
    """
    micro_batches(config, mesh)
    index, count = host_data_shards(mesh)
    return Loader(
        rows, rows_per_step=config.train.rows_per_step, seed=config.seed, host_index=index, host_count=count
    )


def micro_batches(config: Config, mesh: Mesh) -> int:
    """M: how many micro-batches a step's rows are cut into."""
    rows, micro = config.train.rows_per_step, config.train.micro_rows or config.train.rows_per_step
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if micro <= 0 or rows <= 0 or rows % micro or micro % shards:
        fitting = [n for n in range(shards, rows + 1, shards) if rows % n == 0]
        advice = (
            f"it could be {', '.join(map(str, fitting))}"
            if fitting
            else f"make rows_per_step a multiple of {shards}"
        )
        raise InputError(
            f"train.micro_rows={micro} must divide train.rows_per_step={rows} and be a multiple of "
            f"mesh.data x mesh.fsdp = {shards}: {advice}."
        )
    return rows // micro


def steps_from_config(config: Config, rows: Sequence[RowSource]) -> int:
    """`train.steps`, or as many as `train.epochs` over the rows take.

    Raises:
      InputError: neither or both are set.
    """
    if (config.train.steps > 0) == (config.train.epochs > 0):
        raise InputError("Set exactly one of train.steps and train.epochs to more than 0.")
    if config.train.steps > 0:
        return config.train.steps
    total = sum(len(part) for part in rows)
    return max(1, math.ceil(config.train.epochs * total / config.train.rows_per_step))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation and the schedule inside it, for the logs."""

    transformation: optax.GradientTransformationExtraArgs
    schedule: Callable[[Array], Array]


def optimizer_from_config(config: Config, steps: int) -> Optimizer:
    """The optimiser that `config.optim` names."""
    optim = config.optim
    if not (math.isfinite(optim.lr) and optim.lr >= 0):
        raise InputError(f"optim.lr is {optim.lr}; it must be 0 or more.")
    if not 0 <= optim.ema < 1:
        raise InputError(f"optim.ema is {optim.ema}; it must be 0 (off) or a decay below 1, such as 0.999.")
    schedule = make_schedule(
        optim.schedule,
        lr=optim.lr,
        steps=steps,
        warmup=optim.warmup,
        min_lr_ratio=optim.min_lr_ratio,
        decay_share=optim.decay_share,
    )
    transformation = make_optimizer(
        optim.name,
        schedule,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
        momentum=optim.momentum,
    )
    return Optimizer(transformation=transformation, schedule=schedule)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of forward and backward for one token: 6 per matrix parameter (the head included, the
    embedding's look-up not) and 12 L H K T / 2 for causal attention (PaLM, arXiv:2204.02311, appendix B)."""
    heads = config.n_heads * config.head_dim
    attention = config.d_model * heads * 2 + config.d_model * config.n_kv_heads * config.head_dim * 2
    matrices = config.n_layers * (attention + 3 * config.d_model * config.d_ff)
    matrices += config.vocab_size * config.d_model
    return 6.0 * matrices + 6.0 * config.n_layers * heads * length


def abstract_on_mesh(make: Callable[..., PyTree], mesh: Mesh, *arguments: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of what `make` would give, without making it."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(make, *arguments)
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def seed_key(seed: int) -> Array:
    """The run's typed PRNG key."""
    if not 0 <= seed < 2**31:
        raise InputError(f"seed is {seed}; it must be between 0 and 2147483647.")
    return jax.random.key(np.uint32(seed))
