"""The `Task` of an algorithm that learns from its own answers (PPO, RLOO): an iteration draws, scores and learns.

    prompts -> `roll_out`: answers from the engine -> `Scorer`: a score each
    -> `experience_of`: log-probabilities, values, a reward per token
    -> the algorithm's `train_step`, which is made of `minibatch_updates`: one jitted program, state donated

One iteration is one step of the training loop. What is drawn depends on `seed` and the step alone, so a run that was
killed, even while it was writing answers, writes the same ones again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config

from posttrain_jax.algorithms.collect import NORMALIZE_SEED, SAMPLED_PROMPTS, Collector, Evaluation
from posttrain_jax.algorithms.pretraining import Pretraining
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.optim import scale_and_delay
from posttrain_jax.core.sharding import batch_sharding, jit_step, put_batch, replicated
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import (
    Array,
    Batch,
    CollectorState,
    Maximum,
    Metric,
    Metrics,
    PartMetrics,
    PyTree,
    StepBatch,
    Task,
    TrainState,
)
from posttrain_jax.core.updates import apply_gradients, gradient_sums, new_state
from posttrain_jax.data.loader import Loader
from posttrain_jax.models.transformer import Model
from posttrain_jax.rollouts.draw import rollout_engine
from posttrain_jax.rollouts.experience import Networks, experience_of
from posttrain_jax.rollouts.score import Scorer
from posttrain_jax.run.stop_rules import StopRules
from posttrain_jax.wiring.experiment import (
    ModelSpec,
    abstract_on_mesh,
    is_trained,
    optimizer_from_config,
    seed_key,
    steps_from_config,
)
from posttrain_jax.wiring.online_config import (
    ValueNetwork,
    check_gold,
    cut_from_config,
    gold_from_config,
    prompts_from_config,
    reference_model,
    reference_params,
    rollout_options,
    scorer_from_config,
)


@dataclasses.dataclass(frozen=True)
class Online:
    """What is an algorithm's own.

    Attributes:
      train_step: (state, experience, kl per answer, pretraining rows or {}, *, networks, optimizer, schedule,
        ema_decay) -> (state, metrics).
      updates: of the optimizer in an iteration.
      minibatches: into how many parts an iteration's answers are cut.
      value: where the value network comes from: "none"; "policy" = a copy of it with a head of zeros; "shared" = such a
        head alone, on the policy's trunk; else a MODEL, a reward model as in InstructGPT.
      kl_coefficient: beta at the start.
      value_lr: the value network's peak learning rate; 0 = the policy's.
      value_warmup: iterations in which the value network alone is trained.
      pretraining: text that is learnt beside the answers.
    """

    train_step: Callable[..., tuple[TrainState, Metrics]]
    updates: int
    minibatches: int
    value: str
    kl_coefficient: float
    value_lr: float = 0.0
    value_warmup: int = 0
    pretraining: Pretraining | None = None


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
    trained, frozen = partition(params, lambda path: _is_learnt(path, model))
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


def _is_learnt(path: str, model: Model) -> bool:
    """Of the value network everything but its head's gain, which is a statistic of a reward model's scores: OpenAI's
    value heads are linear layers, a kernel and a bias (lm-human-preferences `fc_layer`; arXiv:2009.01325)."""
    return path != "value/score_head/gain" if is_value(path) else is_trained(path, model)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A second loss, whose gradient is added to that of the answers in every minibatch.

    Attributes:
      batch: leaves `[M, B, ...]`, `minibatches` shares one after the other.
      losses: (whole parameters, `[B, ...]`) -> (sum of losses, metrics with `name`).
      name: of the metric that holds the loss's sum and count.
      coefficient: of the mean of this loss, beside the mean of the first.
    """

    batch: PyTree
    losses: Callable[[PyTree, Any], tuple[Array, Metrics]]
    name: str
    coefficient: float


def minibatch_updates(
    state: TrainState,
    experience: PyTree,
    *,
    epochs: int,
    minibatches: int,
    targets: Callable[[Any], PyTree],
    losses: Callable[[PyTree, PyTree], tuple[Array, PartMetrics]],
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    mixed: Mixed | None = None,
) -> tuple[TrainState, Metrics]:
    """Epochs x minibatches over `[M, B, ...]`, every epoch in an order of its own, each minibatch an update.

    Args:
      state: as `init_state` makes it.
      experience: answers in micro-batches, every leaf `[M, B, ...]`.
      epochs, minibatches: how often, and in how many parts.
      targets: of a whole minibatch `[N, ...]`: what its rows are moved towards, `[N, ...]`.
      losses: (whole parameters, targets `[B, ...]`) -> (sum of losses, metrics with "loss").
      optimizer, schedule, ema_decay: as everywhere.
      mixed: a second loss; the i-th minibatch of every epoch has the i-th share of its rows.

    Returns:
      The state one step later, and metrics over all updates (the schedule's is that of the first).
    """
    micro, rows = jax.tree.leaves(experience)[0].shape[:2]
    answers = micro * rows
    flat = jax.tree.map(lambda leaf: leaf.reshape(answers, *leaf.shape[2:]), experience)
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), epochs)
    orders_EN = jax.vmap(lambda key: jax.random.permutation(key, answers))(keys)

    def add_mixed(
        state: TrainState, mixed: Mixed, number: Array, gradients: PyTree, count: Array
    ) -> tuple[PyTree, Metrics]:
        shares = jax.tree.map(lambda leaf: leaf.reshape(minibatches, -1, *leaf.shape[1:]), mixed.batch)
        share = jax.tree.map(lambda leaf: leaf[number % minibatches], shares)

        def loss_sum(params: PyTree, part: PyTree) -> tuple[Array, Metrics]:
            return mixed.losses(combine(params, state.frozen), part)

        more, metrics = gradient_sums(loss_sum, state.params, share)
        # The update divides by the answers' count, so that this sum becomes coefficient x its own mean.
        factor = mixed.coefficient * count / jnp.maximum(metrics[mixed.name].count, 1.0)
        return jax.tree.map(lambda own, other: own + factor * other, gradients, more), metrics

    def update(state: TrainState, turn: tuple[Array, Array]) -> tuple[TrainState, PartMetrics]:
        number, order_N = turn
        whole = targets(jax.tree.map(lambda leaf: leaf[order_N], flat))
        cut = jax.tree.map(lambda leaf: leaf.reshape(-1, rows, *leaf.shape[1:]), whole)

        def loss_sum(params: PyTree, part: PyTree) -> tuple[Array, PartMetrics]:
            return losses(combine(params, state.frozen), part)

        gradients, metrics = gradient_sums(loss_sum, state.params, cut)
        loss = metrics["loss"]
        assert isinstance(loss, Metric)
        if mixed is not None:
            gradients, more = add_mixed(state, mixed, number, gradients, loss.count)
            mean = more[mixed.name].sum / jnp.maximum(more[mixed.name].count, 1.0)
            loss = Metric(loss.sum + mixed.coefficient * mean * loss.count, loss.count)
            metrics |= more | {"loss": loss}
        before = state.skipped
        state, update_metrics = apply_gradients(
            state, gradients, loss.sum, optimizer=optimizer, count=loss.count, ema_decay=ema_decay
        )
        named = {**{f"train/{name}": metric for name, metric in metrics.items()}, **update_metrics}
        kept = state.skipped == before

        def counted(metric: Metric | Maximum) -> Metric | Maximum:
            """As it is, or nothing: an update that is skipped, for something in it is not finite, is in no mean."""
            if isinstance(metric, Maximum):
                return Maximum(jnp.where(kept, metric.value, -jnp.inf))
            return jax.tree.map(lambda leaf: jnp.where(kept, leaf, 0), metric)

        return state, {name: counted(metric) for name, metric in named.items()}

    updates = state.opt_state["updates"]
    inner = dataclasses.replace(state, opt_state=state.opt_state["optimizer"])
    turns = jnp.arange(epochs * minibatches), orders_EN.reshape(-1, answers // minibatches)
    inner, stacked = jax.lax.scan(update, inner, turns)
    joined = {name: metric.over_leading_axis() for name, metric in stacked.items()}
    metrics = {
        name: metric.as_metric() if isinstance(metric, Maximum) else metric for name, metric in joined.items()
    }
    metrics |= {
        "train/lr": Metric.of(
            schedule(updates - state.skipped)
        ),  # the optimizer does not count skipped updates
        "train/skipped": Metric.of(inner.skipped),
        "train/skipped_in_row": Metric.of(inner.skipped_in_row),
    }
    opt_state = {**state.opt_state, "optimizer": inner.opt_state, "updates": updates + epochs * minibatches}
    return dataclasses.replace(inner, step=state.step + 1, opt_state=opt_state), metrics


class _Batches:
    """The collector of the loop: prompts from a loader, experience made of their completions, and pretraining text.

    The scores' normalization is part of the state: found again, on another mesh or with a reward that failed at a
    completion this time, it would be another one in the middle of a run.
    """

    def __init__(
        self,
        prompts: Loader,
        text: Loader | None,
        scorers: Sequence[Scorer],
        collect: Callable[[TrainState, dict[str, np.ndarray], dict[str, np.ndarray]], tuple[PyTree, Metrics]],
    ) -> None:
        self._loaders = {"prompts": prompts} if text is None else {"prompts": prompts, "text": text}
        self._scorers = scorers
        self._collect = collect

    def next(self, state: TrainState) -> StepBatch:
        """An iteration's experience."""
        rows = {name: next(loader) for name, loader in self._loaders.items()}
        text = rows["text"].arrays if "text" in rows else {}
        batch, metrics = self._collect(state, rows["prompts"].arrays, text)
        return StepBatch(batch, metrics, rows["prompts"].row_ids)

    def get_state(self) -> CollectorState:
        loaders = {name: loader.get_state() for name, loader in self._loaders.items()}
        return CollectorState({**loaders, "normalization": list(self._scorers[0].normalization)})

    def set_state(self, state: CollectorState) -> None:
        for name, loader in self._loaders.items():
            loader.set_state(state.values[name])
        self._scorers[0].normalization = state.values["normalization"]

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()
        for scorer in self._scorers:
            scorer.close()


def online_task(config: Config, workdir: Path, policy: ModelSpec, mesh: Mesh, online: Online) -> Task:
    """The algorithm's functions with prompts, engine, rewards, optimizer and evaluation.

    Raises:
      InputError: a bad value, a bad prompt, a model or a reward that cannot be used.
    """
    key = seed_key(config.seed)
    cut = cut_from_config(config, mesh, minibatches=online.minibatches)
    options = rollout_options(config, policy)
    check_gold(config)
    prompts, held_out = prompts_from_config(config, policy, workdir)
    steps = steps_from_config(config, prompts.sources)
    schedule, optimizer = _optimizer(config, steps, online)
    value = ValueNetwork(online.value, config, policy, mesh)
    networks = Networks(policy.model, reference_model(config, policy), value.model, options.temperature)
    scorer = scorer_from_config(config, policy, mesh, cut)
    gold = gold_from_config(config, policy, mesh, cut)
    make_state = functools.partial(
        init_state,
        model=policy.model,
        kl_coefficient=online.kl_coefficient,
        optimizer=optimizer,
        ema_decay=config.optim.ema,
    )
    abstract = abstract_on_mesh(make_state, mesh, value.abstract(policy.model.abstract_params()), key)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    if jax.process_index() == 0:
        policy.describe(workdir / "model")
    longest = max(prompt.tokens.size for prompt in [*prompts.all(), *held_out])
    row_length = min(-(-(longest + options.max_new_tokens) // 8) * 8, config.data.max_length)
    start = policy.init_params(mesh, key) if config.rollout.reference == "frozen" else {}
    collector = Collector(
        policy=policy,
        engine=rollout_engine(policy.model, options, row_length=row_length, mesh=mesh),
        options=options,
        row_length=row_length,
        scorer=scorer,
        mesh=mesh,
        reference=reference_params(config.rollout.reference, start),
        experience=jit_step(
            functools.partial(experience_of, networks=networks),
            mesh,
            in_shardings=(None, None, batch_sharding(mesh), None),
            out_shardings=(batch_sharding(mesh), replicated(mesh)),
        ),
        max_logp_difference=config.rollout.max_logp_difference,
    )

    def first_state() -> TrainState:
        params = policy.init_params(mesh, key)
        if config.score.normalize and not scorer.is_normalized:
            # Drawn, for files may be sorted (IMDb's training rows: first all the negative ones).
            count = min(-(-config.score.normalize // options.samples), len(prompts))
            drawn = np.random.default_rng(config.seed).choice(len(prompts), count, replace=False)
            everything = prompts.all()
            first = [everything[place] for place in np.sort(drawn).tolist()]
            gain, bias = scorer.normalize(collector.roll_out(params, first, NORMALIZE_SEED))
            log_on_host0(
                f"Scores are {gain:.6g} x score + {bias:.6g}: mean 0, variance 1 over {count:,} prompts."
            )
        build = jit_step(make_state, mesh, in_shardings=None, out_shardings=places, donate=(0,))
        return build(value.join(params), key)

    learn = jit_step(
        functools.partial(
            online.train_step,
            networks=networks,
            optimizer=optimizer,
            schedule=schedule,
            ema_decay=config.optim.ema,
        ),
        mesh,
        in_shardings=(places, batch_sharding(mesh), None, batch_sharding(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate=(0,),
    )
    text = online.pretraining

    def collect(
        state: TrainState, places: dict[str, np.ndarray], packed: dict[str, np.ndarray]
    ) -> tuple[PyTree, Metrics]:
        asked = [prompts.at(place) for place in places["places"].tolist()]
        seed = step_seed(config.seed, int(state.step))
        experience, metrics = collector.collect(state, asked, seed, cut.micro_batches)
        mixed: PyTree = put_batch(packed, mesh, text.micro_batches, Batch) if text is not None else {}
        kl = metrics["kl_per_sequence"]
        named = {f"train/{name}": metric for name, metric in metrics.items()}
        return (experience, kl.sum / kl.count, mixed), named

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        started = time.perf_counter()
        state, metrics = learn(state, *batch)
        jax.block_until_ready(metrics)
        return state, {**metrics, "train/seconds_train": Metric.of(time.perf_counter() - started)}

    loader = Loader(prompts.sources, rows_per_step=config.train.rows_per_step, seed=config.seed)
    shown = held_out or prompts.all()[:SAMPLED_PROMPTS]
    evaluation = Evaluation(collector.at_temperature(config.eval.temperature), shown, gold)
    return Task(
        steps=steps,
        init_state=first_state,
        abstract_state=abstract,
        collector=_Batches(
            loader,
            text.loader(mesh, config.seed) if text is not None else None,
            [scorer] if gold is None else [scorer, gold],
            collect,
        ),
        train_step=train_step,
        evaluate=evaluation.metrics if held_out else None,
        sample=evaluation.samples,
        flops_per_token=0.0,  # an iteration is many passes over its tokens; the share of the peak is not told
        stop=StopRules(**config.stop).reason,
        ahead=0,
    )


def _optimizer(
    config: Config, steps: int, online: Online
) -> tuple[Callable[[Array], Array], optax.GradientTransformationExtraArgs]:
    """The schedule, and the optimizer with what is the value network's own."""
    optimizer = optimizer_from_config(config, steps * online.updates)
    if not online.value_lr and not online.value_warmup:
        return optimizer.schedule, optimizer.transformation
    if not config.optim.lr:
        raise InputError("ppo.value_lr and ppo.value_warmup need optim.lr above 0.")
    own = scale_and_delay(
        is_value,
        scale=(online.value_lr or config.optim.lr) / config.optim.lr,
        delay=online.value_warmup * online.updates,
    )
    return optimizer.schedule, optax.chain(optimizer.transformation, own)


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's answers, from the run's."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0] >> 1)
