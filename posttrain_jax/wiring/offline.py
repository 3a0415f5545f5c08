"""The `Task` of an algorithm that learns from rows on disk: text or preferences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from posttrain_jax.algorithms.contract import PreferenceAlgorithm, PreferenceSetup, Steps, TextAlgorithm
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.sharding import (
    RowBatch,
    batch_sharding,
    host_data_shards,
    jit_step,
    put_batch,
    replicated,
)
from posttrain_jax.core.trees import combine
from posttrain_jax.core.types import Metrics, PyTree, Task, TrainState
from posttrain_jax.data.loader import RowSource, eval_batches
from posttrain_jax.data.preference_groups import PreferenceData
from posttrain_jax.data.preference_rows import Preferences
from posttrain_jax.forward.completions import map_completions
from posttrain_jax.models.spec import ModelSpec
from posttrain_jax.run.batches import RowBatches
from posttrain_jax.run.memory import bytes_per_device
from posttrain_jax.run.metrics import Accumulator, to_host
from posttrain_jax.sampling.fixed_prompts import complete_fixed_prompts
from posttrain_jax.wiring.data import chat_options, eval_rows, read_preferences, read_texts
from posttrain_jax.wiring.experiment import OfflineExperiment, PreferenceExperiment, TextExperiment
from posttrain_jax.wiring.memory import activation_bytes
from posttrain_jax.wiring.model import mesh_of, model_spec
from posttrain_jax.wiring.preference_reference import make_reference
from posttrain_jax.wiring.task import (
    abstract_on_mesh,
    flops_per_token,
    make_loader,
    micro_batches,
    optimizer_of,
    run_steps,
    seed_key,
)


def text_task(experiment: TextExperiment, algorithm: TextAlgorithm, workdir: Path) -> Task:
    """The task of an algorithm that learns from texts and conversations.

    Raises:
      InputError: a bad row, a model that cannot be used, sizes that do not divide.
    """
    data = experiment.data
    mesh = mesh_of(experiment.mesh)
    spec = model_spec(experiment)
    rows = read_texts(data, spec.tokenizer, workdir, seed=experiment.seed)
    steps = algorithm.steps(spec.model, rows.train, rows.held_out, data.max_length)
    return _task(experiment, workdir, spec, mesh, steps, is_reward=False)


def preference_task(experiment: PreferenceExperiment, algorithm: PreferenceAlgorithm, workdir: Path) -> Task:
    """The task of an algorithm that learns from preferences.

    Raises:
      InputError: a bad row, a model that cannot be used, sizes that do not divide.
    """
    options, train = experiment.options, experiment.train
    mesh = mesh_of(experiment.mesh)
    micro = micro_batches(train, mesh)
    spec = model_spec(experiment, is_reward=algorithm.is_reward)
    algorithm.check_model(options, spec)
    data = preferences_of(experiment, spec, workdir, change=algorithm.change_data)
    algorithm.check_data(options, data)
    kind = algorithm.reference(options)
    setup = PreferenceSetup(
        spec=spec,
        data=data,
        reference=make_reference(
            kind, algorithm.reference_model(options), algorithm.section, experiment, spec, data, mesh, workdir
        ),
        map_completions=lambda function, params, source: map_completions(
            function, params, source, data.shape, mesh, groups=train.rows_per_step, micro_batches=micro
        ),
        seed=experiment.seed,
    )
    steps = algorithm.steps(options, setup)
    return _task(experiment, workdir, spec, mesh, steps, is_reward=algorithm.is_reward)


def preferences_of(
    experiment: PreferenceExperiment,
    spec: ModelSpec,
    workdir: Path,
    *,
    change: Callable[..., PreferenceData] | None = None,
) -> Preferences:
    """The preferences of an experiment, as `read_preferences` reads them."""
    return read_preferences(
        experiment.data,
        spec.tokenizer,
        workdir,
        seed=experiment.seed,
        rows_per_step=experiment.train.rows_per_step,
        eval_rows=eval_rows(experiment.train, experiment.eval)[0],
        attention=spec.model.module.implementation,
        change=change,
    )


def warn_longer_than_context(rows: Sequence[RowSource], context: int) -> None:
    """Warns of sequences that are longer than the context that the model was made for (they are trained, too)."""
    lengths = np.concatenate([source.sequence_lengths for source in rows])
    longer = int((lengths > context).sum())
    if longer:
        log_on_host0(
            f"Warning: {longer:,} of {len(lengths):,} sequences are longer (up to {int(lengths.max()):,} tokens) than "
            f"the {context:,} tokens that the model was made for (max_position_embeddings), and are trained as they "
            f"are; data.max_length={context} cuts them."
        )


def jit_train_step(
    step: Callable[..., tuple[TrainState, Metrics]], mesh: Mesh, state: TrainState, *constants: PyTree
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """The compiled step of an algorithm that learns from rows: (state, batch) -> (state, metrics), the state donated.

    Args:
      step: (state, batch `[M, B, ...]`, *constants) -> (state, metrics).
      mesh: rows are split over data and fsdp.
      state: arrays or shapes, with the shardings that the state keeps.
      constants: trees on the mesh that no step changes.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    compiled = jit_step(
        step,
        mesh,
        in_shardings=(shardings, batch_sharding(mesh), *(None for _ in constants)),
        out_shardings=(shardings, replicated(mesh)),
        donate=(0,),
    )
    return lambda state, batch: compiled(state, batch, *constants)


def _task(
    experiment: OfflineExperiment,
    workdir: Path,
    spec: ModelSpec,
    mesh: Mesh,
    steps: Steps[RowBatch],
    *,
    is_reward: bool,
) -> Task:
    """The algorithm's functions, jitted and sharded, with its loader, optimizer, evaluation and samples."""
    evaluation = experiment.eval
    key = seed_key(experiment.seed)
    warn_longer_than_context(steps.train, spec.model.config.max_length)
    loader = make_loader(experiment.train, steps.train, mesh, seed=experiment.seed)
    count = run_steps(experiment.train, steps.train)
    optimizer = optimizer_of(experiment.optim, updates=count)
    make_state = functools.partial(
        steps.make_state, optimizer=optimizer.transformation, ema_decay=experiment.optim.ema
    )
    abstract = abstract_on_mesh(make_state, mesh, spec.model.abstract_params(), key)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def first_state() -> TrainState:
        params = spec.init_params(mesh, key)
        # A reward model leaves the vocabulary's head behind, which nothing can be written into.
        donate = () if is_reward else (0,)
        build = jit_step(make_state, mesh, in_shardings=None, out_shardings=shardings, donate=donate)
        return build(params, key)

    if jax.process_index() == 0:
        spec.describe(workdir / "model", reward=is_reward)
    step = functools.partial(
        steps.train_step,
        optimizer=optimizer.transformation,
        schedule=optimizer.schedule,
        ema_decay=experiment.optim.ema,
    )
    sample = None
    if evaluation.prompts and not is_reward:
        sample = complete_fixed_prompts(
            spec.model,
            spec.tokenizer,
            evaluation.prompts,
            max_new_tokens=evaluation.max_new_tokens,
            seed=experiment.seed,
            chat=chat_options(experiment.data, spec.tokenizer, workdir),
        )
    return Task(
        steps=count,
        init_state=first_state,
        abstract_state=abstract,
        collector=RowBatches(
            loader,
            functools.partial(
                put_batch, mesh=mesh, micro_batches=micro_batches(experiment.train, mesh), kind=steps.batch
            ),
        ),
        train_step=jit_train_step(step, mesh, abstract, *steps.constants),
        evaluate=_evaluation(eval_rows(experiment.train, evaluation), steps, mesh)
        if steps.held_out
        else None,
        sample=sample,
        flops_per_token=flops_per_token(spec.model.config, steps.row_tokens),
        finish=steps.finish,
        progress=steps.progress,
        panels=steps.panels,
        memory={
            "activations": activation_bytes(
                spec.model,
                mesh,
                rows=experiment.train.micro_rows or experiment.train.rows_per_step,
                length=steps.row_tokens,
            )
            * steps.members,
            "reference": bytes_per_device(steps.constants),
        },
    )


def _evaluation(
    size: tuple[int, int], steps: Steps[RowBatch], mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """One pass over the held-out rows; two with `eval_first`."""
    at_once, count = size
    host, hosts = host_data_shards(mesh)
    jitted = functools.partial(jit_step, mesh=mesh, in_shardings=None, out_shardings=replicated(mesh))
    step = jitted(steps.eval_step)
    first_step = jitted(steps.eval_first) if steps.eval_first is not None else None

    def means(step: Callable[..., Metrics], *arguments: PyTree) -> dict[str, float]:
        params, *others = arguments
        sums = Accumulator()
        for rows in eval_batches(steps.held_out, rows_per_step=at_once, host_index=host, host_count=hosts):
            batch = put_batch(rows.arrays, mesh, count, steps.batch)
            sums.add(to_host(step(params, batch, *others)))
        return sums.flush()

    def evaluate(state: TrainState) -> dict[str, float]:
        params = combine(state.params, state.frozen)
        known: tuple[PyTree, ...] = steps.constants
        if first_step is not None:
            first = means(first_step, params, *known)
            known = (*known, {name: np.float32(value) for name, value in first.items()})
        return steps.after_eval(means(step, params, *known))

    return evaluate
