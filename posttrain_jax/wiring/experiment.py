"""From a config to the pieces every algorithm needs: mesh, model, optimizer, and the `Task` of one that learns from
rows. With `data.py`, here ConfigDicts end."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.optim import OptimOptions, make_optimizer, make_schedule
from posttrain_jax.core.schema import read
from posttrain_jax.core.sharding import (
    RowBatch,
    batch_sharding,
    host_data_shards,
    jit_step,
    make_mesh,
    put_batch,
    replicated,
    tree_shardings,
)
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import Array, Metrics, PyTree, Task, TrainState
from posttrain_jax.core.updates import new_state
from posttrain_jax.data.chat_template import resolve_template
from posttrain_jax.data.loader import Loader, RowSource, eval_batches
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import write_model_folder
from posttrain_jax.models.io.hf_config import config_from_hf
from posttrain_jax.models.io.load import load_model
from posttrain_jax.models.io.source import Source, has_adapter, is_reward_model, load_config, resolve
from posttrain_jax.models.io.tokenizer import load_tokenizer
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.run.batches import RowBatches
from posttrain_jax.run.metrics import Accumulator, to_host
from posttrain_jax.sampling.fixed_prompts import complete_fixed_prompts
from posttrain_jax.wiring.data import chat_from_config, eval_rows


def mesh_from_config(config: Config) -> Mesh:
    """The mesh that `config.mesh` names."""
    return make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
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
            return partition(self.model.init(key), lambda path: path.endswith(("lora_a", "lora_b")))[0]

        places = partition(shardings, lambda path: path.endswith(("lora_a", "lora_b")))[0]
        with jax.set_mesh(mesh):
            return combine(loaded.params, jax.jit(adapters, out_shardings=places)(key))

    @property
    def has_new_adapter(self) -> bool:
        """Whether it has a LoRA adapter that training starts at zero."""
        return bool(self.model.lora.rank) and not (self.source is not None and has_adapter(self.source))

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


def model_spec_from_config(config: Config, *, reward: bool = False) -> ModelSpec:
    """Resolves `config.model` without reading weights.

    Args:
      config: the experiment.
      reward: a reward model is to be trained, so `model.init` may be one.

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
        if is_reward_model(source) and not reward:
            raise InputError(
                f"model.init={config.model.init} is a reward model, which has no vocabulary head to write with; "
                f"algorithm={config.algorithm} starts from a language model."
            )
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
    return ModelSpec(
        model=model, tokenizer=tokenizer, source=source, original=original, generation=generation
    )


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
    """Splits the parameters into trained and frozen and makes the optimizer's state."""
    trained, frozen = partition(params, lambda path: is_trained(path, model))
    return new_state(trained, frozen, key, optimizer, ema=ema_decay > 0)


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
    if not math.isfinite(config.train.epochs):
        raise InputError(f"train.epochs is {config.train.epochs}; it must be a number, such as 3 or 0.5.")
    total = sum(len(part) for part in rows)
    # The number as it is written: 1.1 x 100 rows are 110, and in floating point a little more.
    steps = Fraction(repr(config.train.epochs)) * total / config.train.rows_per_step
    return max(1, math.ceil(steps))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation and the schedule inside it, for the logs."""

    transformation: optax.GradientTransformationExtraArgs
    schedule: Callable[[Array], Array]


def optimizer_from_config(config: Config, steps: int) -> Optimizer:
    """The optimizer that `config.optim` names."""
    options = read(OptimOptions, config.optim.to_dict(), "optim")
    schedule = make_schedule(options, steps=steps)
    transformation = make_optimizer(options, schedule)
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


@dataclasses.dataclass(frozen=True)
class Offline(Generic[RowBatch]):
    """An algorithm that learns from rows on disk: its pure functions, with all but these arguments bound.

    Attributes:
      make_state: (parameters, key, *, optimizer, ema_decay) -> the first state.
      train_step: (state, batch `[M, B, ...]`, *constants, *, optimizer, schedule, ema_decay) -> (state, metrics).
      eval_step: (whole parameters, batch `[M, B, ...]`, *constants) -> metrics named "eval/..."; with `eval_first` its
        means follow the constants.
      train, held_out: the rows.
      batch: what a step's rows become.
      row_tokens: T, for the count of FLOPs.
      constants: trees on the mesh that every step is handed and none changes.
      eval_first: as eval_step, for numbers that it needs of all held-out rows: a pass over them that comes before.
      after_eval: what is said of, or added to, the values of an evaluation.
      is_reward: it trains a reward model: checkpoints hold a `score_head`, and there are no answers to sample.
      finish: as in `Task`.
    """

    make_state: Callable[..., TrainState]
    train_step: Callable[..., tuple[TrainState, Metrics]]
    eval_step: Callable[..., Metrics]
    train: Sequence[RowSource]
    held_out: Sequence[RowSource]
    batch: type[RowBatch]
    row_tokens: int
    constants: tuple[PyTree, ...] = ()
    eval_first: Callable[..., Metrics] | None = None
    after_eval: Callable[[dict[str, float]], dict[str, float]] = lambda values: values
    is_reward: bool = False
    finish: Callable[[TrainState], TrainState] | None = None


def say_longer_than_context(rows: Sequence[RowSource], context: int) -> None:
    """Says how many sequences go beyond the positions that the model was made for (they are trained all the same)."""
    lengths = np.concatenate([source.sequence_lengths for source in rows])
    longer = int((lengths > context).sum())
    if longer:
        log_on_host0(
            f"Warning: {longer:,} of {len(lengths):,} sequences are longer (up to {int(lengths.max()):,} tokens) than "
            f"the {context:,} tokens that the model was made for (max_position_embeddings), and are trained as they "
            f"are; data.max_length={context} cuts them."
        )


def task_from_config(
    config: Config, workdir: Path, policy: ModelSpec, mesh: Mesh, algorithm: Offline[RowBatch]
) -> Task:
    """The algorithm's functions, jitted and sharded, with its loader, optimizer, evaluation and samples.

    Raises:
      InputError: a bad value of `config.train`, `config.optim` or `config.seed`.
    """
    key = seed_key(config.seed)
    say_longer_than_context(algorithm.train, policy.model.config.max_length)
    loader = loader_from_config(config, algorithm.train, mesh)
    steps = steps_from_config(config, algorithm.train)
    optimizer = optimizer_from_config(config, steps)
    make_state = functools.partial(
        algorithm.make_state, optimizer=optimizer.transformation, ema_decay=config.optim.ema
    )
    abstract = abstract_on_mesh(make_state, mesh, policy.model.abstract_params(), key)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def first_state() -> TrainState:
        params = policy.init_params(mesh, key)
        # A reward model leaves the vocabulary's head behind, which nothing can be written into.
        donate = () if algorithm.is_reward else (0,)
        build = jit_step(make_state, mesh, in_shardings=None, out_shardings=places, donate=donate)
        return build(params, key)

    if jax.process_index() == 0:
        policy.describe(workdir / "model", reward=algorithm.is_reward)
    step = jit_step(
        functools.partial(
            algorithm.train_step,
            optimizer=optimizer.transformation,
            schedule=optimizer.schedule,
            ema_decay=config.optim.ema,
        ),
        mesh,
        in_shardings=(places, batch_sharding(mesh), *(None for _ in algorithm.constants)),
        out_shardings=(places, replicated(mesh)),
        donate=(0,),
    )
    sample = None
    if config.eval.prompts and not algorithm.is_reward:
        sample = complete_fixed_prompts(
            policy.model,
            policy.tokenizer,
            config.eval.prompts,
            max_new_tokens=config.eval.max_new_tokens,
            seed=config.seed,
            chat=chat_from_config(config, policy.tokenizer, workdir),
        )
    return Task(
        steps=steps,
        init_state=first_state,
        abstract_state=abstract,
        collector=RowBatches(
            loader,
            functools.partial(
                put_batch, mesh=mesh, micro_batches=micro_batches(config, mesh), kind=algorithm.batch
            ),
        ),
        train_step=lambda state, batch: step(state, batch, *algorithm.constants),
        evaluate=_evaluation(config, algorithm, mesh) if algorithm.held_out else None,
        sample=sample,
        flops_per_token=flops_per_token(policy.model.config, algorithm.row_tokens),
        finish=algorithm.finish,
    )


def _evaluation(
    config: Config, algorithm: Offline[RowBatch], mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """One pass over the held-out rows; two with `eval_first`."""
    at_once, count = eval_rows(config)
    host, hosts = host_data_shards(mesh)
    jitted = functools.partial(jit_step, mesh=mesh, in_shardings=None, out_shardings=replicated(mesh))
    step = jitted(algorithm.eval_step)
    first_step = jitted(algorithm.eval_first) if algorithm.eval_first is not None else None

    def means(step: Callable[..., Metrics], *arguments: PyTree) -> dict[str, float]:
        params, *others = arguments
        sums = Accumulator()
        for rows in eval_batches(
            algorithm.held_out, rows_per_step=at_once, host_index=host, host_count=hosts
        ):
            batch = put_batch(rows.arrays, mesh, count, algorithm.batch)
            sums.add(to_host(step(params, batch, *others)))
        return sums.flush()

    def evaluate(state: TrainState) -> dict[str, float]:
        params = combine(state.params, state.frozen)
        known: tuple[PyTree, ...] = algorithm.constants
        if first_step is not None:
            first = means(first_step, params, *known)
            known = (*known, {name: np.float32(value) for name, value in first.items()})
        return algorithm.after_eval(means(step, params, *known))

    return evaluate
