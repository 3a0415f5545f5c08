"""The `Task` of an algorithm that learns from the policy's own completions (PPO, RLOO)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from posttrain_jax.algorithms.contract import Online, OnlineAlgorithm, OnlineSizes
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.optim import scale_and_delay
from posttrain_jax.core.sharding import jit_step, replicated
from posttrain_jax.core.trees import partition
from posttrain_jax.core.types import Array, Metric, Metrics, PyTree, Task, TrainState
from posttrain_jax.core.updates import new_state
from posttrain_jax.data.loader import Loader
from posttrain_jax.models.spec import is_trained
from posttrain_jax.models.transformer import Model
from posttrain_jax.rollouts.batch import BatchMaker
from posttrain_jax.rollouts.collector import PolicyCollector
from posttrain_jax.rollouts.evaluation import SAMPLED_PROMPTS, Evaluation
from posttrain_jax.rollouts.experience import Networks
from posttrain_jax.rollouts.sampling import Sampler
from posttrain_jax.rollouts.trajectory import TrajectoryBatch
from posttrain_jax.run.memory import bytes_per_device
from posttrain_jax.sampling.score import Difference
from posttrain_jax.wiring.experiment import OnlineExperiment
from posttrain_jax.wiring.memory import activation_bytes, cache_bytes
from posttrain_jax.wiring.model import mesh_of, model_spec
from posttrain_jax.wiring.networks import ValueNetwork, reference_policy
from posttrain_jax.wiring.rollouts import (
    batch_shape,
    check_score,
    make_scorer,
    prompts_from_config,
    sampling_options,
)
from posttrain_jax.wiring.task import abstract_on_mesh, optimizer_of, run_steps, seed_key
from posttrain_jax.wiring.text import text_batches


def init_state(
    params: PyTree,
    key: Array,
    *,
    model: Model,
    kl_coefficient: float,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
) -> TrainState:
    """The first state; `opt_state` holds the optimizer's, beta and the number of updates, so that all are saved."""
    trained, frozen = partition(params, lambda path: _is_trained(path, model))
    state = new_state(trained, frozen, key, optimizer, ema=ema_decay > 0)
    opt_state = {
        "optimizer": state.opt_state,
        "kl_coefficient": jnp.float32(kl_coefficient),
        "updates": jnp.int32(0),
    }
    return dataclasses.replace(state, opt_state=opt_state)


def is_value(path: str) -> bool:
    """Whether a parameter is the value network's."""
    return path.startswith("value/")


def _is_trained(path: str, model: Model) -> bool:
    """Of the value network everything but its head's gain, which is a statistic of a reward model's scores: OpenAI's
    value heads are linear layers, a kernel and a bias (lm-human-preferences `fc_layer`; arXiv:2009.01325)."""
    return path != "value/score_head/gain" if is_value(path) else is_trained(path, model)


def online_task(experiment: OnlineExperiment, algorithm: OnlineAlgorithm, workdir: Path) -> Task:
    """The algorithm's train step with its collector, optimizer and evaluation.

    Raises:
      InputError: a bad value, a bad prompt, a model or a reward that cannot be used.
    """
    sizes = OnlineSizes(
        prompts=experiment.train.rows_per_step,
        samples=experiment.rollout.samples,
        max_length=experiment.data.max_length,
    )
    online = algorithm.online(experiment.options, sizes)
    mesh = mesh_of(experiment.mesh)
    policy = model_spec(experiment)
    key = seed_key(experiment.seed)
    options = sampling_options(experiment, policy)
    score, stop = experiment.score, experiment.stop
    check_score(score, experiment)
    prompts, held_out = prompts_from_config(experiment, policy, workdir)
    longest = max(prompt.tokens.size for prompt in [*prompts.all(), *held_out])
    shape = batch_shape(
        experiment,
        mesh,
        epochs=online.epochs,
        minibatches=online.minibatches,
        length=min(-(-(longest + options.max_new_tokens) // 8) * 8, experiment.data.max_length),
    )
    steps = run_steps(experiment.train, prompts.sources)
    schedule, optimizer = _optimizer(experiment, steps, online)
    value = ValueNetwork(online.value, experiment, policy, mesh)
    kind = reference_kind(experiment, online, has_new_adapter=policy.has_new_adapter)
    reference = reference_policy("rollout.reference", kind, experiment, policy, mesh, key)
    text = None
    if online.text is not None:
        text = text_batches(online.text, experiment, policy, mesh, workdir, minibatches=online.minibatches)
    make_state = functools.partial(
        init_state,
        model=policy.model,
        kl_coefficient=online.kl_coefficient,
        optimizer=optimizer,
        ema_decay=experiment.optim.ema,
    )
    abstract = abstract_on_mesh(make_state, mesh, value.abstract(policy.model.abstract_params()), key)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if jax.process_index() == 0:
        policy.describe(workdir / "model")
    # After all that may be refused, for functions are in processes of their own from here on.
    scorer = make_scorer(score, experiment, policy, mesh, shape)
    try:
        gold = make_scorer(score.gold, experiment, policy, mesh, shape) if score.gold is not None else None
    except InputError:
        scorer.close()
        raise
    sampler = Sampler(policy.model, policy.tokenizer, options, length=shape.length, mesh=mesh)
    collector = PolicyCollector(
        prompts,
        Loader(prompts.sources, rows_per_step=experiment.train.rows_per_step, seed=experiment.seed),
        sampler,
        scorer,
        BatchMaker(shape, mesh, seed=experiment.seed, reference=reference, temperature=options.temperature),
        seed=experiment.seed,
        text=text,
        gold=gold,
    )

    def first_state() -> TrainState:
        params = policy.init_params(mesh, key)
        collector.normalize_scores(params, score.normalize)
        build = jit_step(make_state, mesh, in_shardings=None, out_shardings=shardings, donate=(0,))
        return build(value.join(params), key)

    networks = Networks(policy.model, value.model, options.temperature)
    step = jit_step(
        functools.partial(
            online.train_step,
            networks=networks,
            optimizer=optimizer,
            schedule=schedule,
            ema_decay=experiment.optim.ema,
        ),
        mesh,
        in_shardings=(shardings, None),
        out_shardings=(shardings, replicated(mesh)),
        donate=(0,),
    )
    temperature = experiment.eval.temperature
    evaluation = Evaluation(
        sampler,
        scorer,
        held_out or prompts.all()[:SAMPLED_PROMPTS],
        gold=gold,
        temperature=None if temperature < 0 else temperature,
    )
    return Task(
        steps=steps,
        init_state=first_state,
        abstract_state=abstract,
        collector=collector,
        train_step=functools.partial(_timed_step, step, options.max_logp_difference),
        evaluate=evaluation.metrics if held_out else None,
        sample=evaluation.samples,
        flops_per_token=0.0,  # an iteration is many passes over its tokens; the share of the peak is not told
        stop=stop.reason,
        ahead=0,
        progress=online.progress,
        panels=online.panels,
        memory={
            "activations": activation_bytes(
                policy.model, mesh, rows=shape.micro_rows, length=shape.row_length
            ),
            "reference": bytes_per_device(reference.params) if reference is not None else 0,
            "KV cache": cache_bytes(policy.model, mesh, rows=options.batch_size, length=shape.length),
        },
    )


def _timed_step(
    step: Callable[..., tuple[TrainState, Metrics]],
    max_logp_difference: float,
    state: TrainState,
    batch: TrajectoryBatch,
) -> tuple[TrainState, Metrics]:
    """The jitted step, timed, and stopped where the sampler's log-probabilities are not the trainer's.

    Raises:
      InputError: they are further apart than `max_logp_difference` (0 = any).
    """
    started = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    seconds = Metric(*jax.device_put((np.float32(time.perf_counter() - started), np.float32(1))))
    names = "train/sampler_logp_gap_max", "train/sampler_logp_gap_per_token"
    gap, mean_gap = jax.device_get([metrics[name] for name in names])
    Difference(
        largest=float(gap.sum),
        mean=float(mean_gap.sum) / max(float(mean_gap.count), 1.0),
        tokens=int(mean_gap.count),
    ).check(max_logp_difference)
    return state, {**metrics, "train/seconds_train": seconds}


def reference_kind(experiment: OnlineExperiment, online: Online, *, has_new_adapter: bool) -> str:
    """What `rollout.reference` comes to: "auto" is the policy that training starts from where the KL to it is charged
    or watched, else none.

    Raises:
      InputError: it is none, and the KL to it is charged or watched.
    """
    kind = experiment.rollout.reference
    needs = [
        name
        for name, value in (("the KL coefficient", online.kl_coefficient), ("stop.kl", experiment.stop.kl))
        if value
    ]
    if kind == "auto":
        return "none" if not needs else "adapter" if has_new_adapter else "frozen"
    if kind == "none" and needs:
        raise InputError(
            f"rollout.reference is none, but {needs[0]} is above 0 and needs one; use auto, or set that to 0."
        )
    return kind


def _optimizer(
    experiment: OnlineExperiment, steps: int, online: Online
) -> tuple[Callable[[Array], Array], optax.GradientTransformationExtraArgs]:
    """The schedule, and the optimizer with what is the value network's own."""
    updates = online.epochs * online.minibatches
    optimizer = optimizer_of(experiment.optim, updates=steps * updates)
    if not online.value_lr and not online.value_warmup:
        return optimizer.schedule, optimizer.transformation
    if not experiment.optim.lr:
        raise InputError("ppo.value_lr and ppo.value_warmup need optim.lr above 0.")
    own = scale_and_delay(
        is_value,
        scale=(online.value_lr or experiment.optim.lr) / experiment.optim.lr,
        delay=online.value_warmup * updates,
    )
    return optimizer.schedule, optax.chain(optimizer.transformation, own)
