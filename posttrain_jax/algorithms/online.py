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

from posttrain_jax.algorithms.online_config import (
    ValueNetwork,
    cut_from_config,
    prompts_from_config,
    reference_model,
    rollout_options,
    scorer_from_config,
)
from posttrain_jax.data.loader import Loader
from posttrain_jax.data.prompts import Prompt
from posttrain_jax.experiment import (
    Policy,
    abstract_on_mesh,
    flops_per_token,
    is_trained,
    optimizer_from_config,
    seed_key,
    steps_from_config,
)
from posttrain_jax.metrics import say
from posttrain_jax.models.transformer import Model
from posttrain_jax.optim import apply_gradients, gradient_sums, new_state
from posttrain_jax.rollouts.draw import RolloutOptions, Rollouts, put_rollouts, roll_out
from posttrain_jax.rollouts.experience import Experience, Networks, experience_of
from posttrain_jax.rollouts.score import Scored, Scorer
from posttrain_jax.sharding import batch_sharding, jit_step, replicated
from posttrain_jax.trees import combine, partition
from posttrain_jax.types import Array, HostRows, Metric, Metrics, PyTree, Task, TrainState

EVAL_SEED = 2**31 - 1  # of the answers to held-out prompts, which no step draws with


@dataclasses.dataclass(frozen=True)
class Online:
    """What is an algorithm's own.

    Attributes:
      train_step: (state, experience, kl per answer, *, networks, optimizer, schedule, ema_decay) -> (state, metrics).
      updates: of the optimiser in an iteration.
      minibatches: into how many parts an iteration's answers are cut.
      value: where the value network comes from: "none"; "policy" = a copy of it with a head of zeros; "shared" = such a
        head alone, on the policy's trunk; else a MODEL, a reward model as in InstructGPT.
      kl_coefficient: beta at the start.
    """

    train_step: Callable[..., tuple[TrainState, Metrics]]
    updates: int
    minibatches: int
    value: str
    kl_coefficient: float


def init_state(
    params: PyTree,
    key: Array,
    *,
    model: Model,
    kl_coefficient: float,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
) -> TrainState:
    """The first state; `opt_state` holds the optimiser's, beta and the number of updates, so that all are saved."""
    trained, frozen = partition(params, lambda path: path.startswith("value/") or is_trained(path, model))
    state = new_state(trained, frozen, key, optimizer, ema=ema_decay > 0)
    opt_state = {
        "optimizer": state.opt_state,
        "kl_coefficient": jnp.float32(kl_coefficient),
        "updates": jnp.int32(0),
    }
    return dataclasses.replace(state, opt_state=opt_state)


def minibatch_updates(
    state: TrainState,
    experience: PyTree,
    *,
    epochs: int,
    minibatches: int,
    targets: Callable[[Any], PyTree],
    losses: Callable[[PyTree, PyTree], tuple[Array, Metrics]],
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
    """Epochs x minibatches over `[M, B, ...]`, every epoch in an order of its own, each minibatch an update.

    Args:
      state: as `init_state` makes it.
      experience: answers in micro-batches, every leaf `[M, B, ...]`.
      epochs, minibatches: how often, and in how many parts.
      targets: of a whole minibatch `[N, ...]`: what its rows are moved towards, `[N, ...]`.
      losses: (whole parameters, targets `[B, ...]`) -> (sum of losses, metrics with "loss").
      optimizer, schedule, ema_decay: as everywhere.

    Returns:
      The state one step later, and metrics over all updates (the schedule's is that of the first).
    """
    micro, rows = jax.tree.leaves(experience)[0].shape[:2]
    answers = micro * rows
    flat = jax.tree.map(lambda leaf: leaf.reshape(answers, *leaf.shape[2:]), experience)
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), epochs)
    orders_EN = jax.vmap(lambda key: jax.random.permutation(key, answers))(keys)

    def update(state: TrainState, order_N: Array) -> tuple[TrainState, Metrics]:
        whole = targets(jax.tree.map(lambda leaf: leaf[order_N], flat))
        cut = jax.tree.map(lambda leaf: leaf.reshape(-1, rows, *leaf.shape[1:]), whole)

        def loss_sum(params: PyTree, part: PyTree) -> tuple[Array, Metrics]:
            return losses(combine(params, state.frozen), part)

        gradients, metrics = gradient_sums(loss_sum, state.params, cut)
        loss = metrics["loss"]
        state, update_metrics = apply_gradients(
            state, gradients, loss.sum, optimizer=optimizer, count=loss.count, ema_decay=ema_decay
        )
        return state, {**{f"train/{name}": metric for name, metric in metrics.items()}, **update_metrics}

    updates = state.opt_state["updates"]
    inner = dataclasses.replace(state, opt_state=state.opt_state["optimizer"])
    inner, stacked = jax.lax.scan(update, inner, orders_EN.reshape(-1, answers // minibatches))
    metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)
    metrics |= {
        "train/lr": Metric.of(schedule(updates)),
        "train/skipped": Metric.of(inner.skipped),
        "train/skipped_in_row": Metric.of(inner.skipped_in_row),
    }
    opt_state = {**state.opt_state, "optimizer": inner.opt_state, "updates": updates + epochs * minibatches}
    return dataclasses.replace(inner, step=state.step + 1, opt_state=opt_state), metrics


@dataclasses.dataclass
class _Stream:
    """The prompts' loader; closing it ends the reward workers too."""

    loader: Loader
    scorer: Scorer

    def __next__(self) -> HostRows:
        return next(self.loader)

    def get_state(self) -> dict[str, Any]:
        return self.loader.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.loader.set_state(state)

    def close(self) -> None:
        self.loader.close()
        self.scorer.close()


@dataclasses.dataclass(frozen=True)
class Answered:
    """Answers, their scores, and how long both took."""

    rollouts: Rollouts
    scored: Scored
    seconds_generate: float
    seconds_score: float


@dataclasses.dataclass(frozen=True)
class Collector:
    """Answers prompts with a state's policy and makes experience of the answers.

    Attributes:
      experience: jitted `experience_of`: (whole parameters, beta, rows, reference's parameters).
    """

    policy: Policy
    options: RolloutOptions
    row_length: int
    scorer: Scorer
    mesh: Mesh
    reference_params: PyTree
    experience: Callable[..., tuple[Experience, Metrics]]

    def answers(self, params: PyTree, prompts: Sequence[Prompt], seed: int) -> Answered:
        """Answers and their scores.

        Args:
          params: whole, the value network included.
          prompts: what is answered.
          seed: of the draws.
        """
        started = time.perf_counter()
        own = {name: part for name, part in params.items() if name != "value"}
        rollouts = roll_out(
            self.policy.model, own, prompts, self.options, row_length=self.row_length, seed=seed
        )
        drawn = time.perf_counter()
        scored = self.scorer(rollouts)
        return Answered(rollouts, scored, drawn - started, time.perf_counter() - drawn)

    def collect(
        self, params: PyTree, kl_coefficient: Array, prompts: Sequence[Prompt], seed: int, micro_batches: int
    ) -> tuple[Experience, Metrics]:
        """What is learnt from, and what is said of it (see `rollouts/experience.py`; names without a prefix)."""
        answered = self.answers(params, prompts, seed)
        rollouts, scored = answered.rollouts, answered.scored
        if scored.error:
            say(f"A reward function failed at {sum(scored.failures.values())} answers; first: {scored.error}")
        batch = put_rollouts(rollouts, scored.scores, self.mesh, micro_batches)
        experience, metrics = self.experience(params, kl_coefficient, batch, self.reference_params)
        count = len(rollouts.answers)
        said = {f"score/{name}": Metric.of(values.mean()) for name, values in scored.components.items()}
        said |= {f"failed/{name}": Metric.of(number) for name, number in scored.failures.items()}
        said |= {
            "no_end": Metric(jnp.float32(count - int(rollouts.ended.sum())), jnp.float32(count)),
            "seconds_generate": Metric.of(answered.seconds_generate),
            "seconds_score": Metric.of(answered.seconds_score),
        }
        return experience, {**metrics, **said}


def online_task(config: Config, workdir: Path, policy: Policy, mesh: Mesh, online: Online) -> Task:
    """The algorithm's functions with prompts, engine, rewards, optimiser and evaluation.

    Raises:
      InputError: a bad value, a bad prompt, a model or a reward that cannot be used.
    """
    key = seed_key(config.seed)
    cut = cut_from_config(config, mesh, minibatches=online.minibatches)
    options = rollout_options(config, policy)
    prompts, held_out = prompts_from_config(config, policy)
    steps = steps_from_config(config, prompts.sources)
    optimizer = optimizer_from_config(config, steps * online.updates)
    value = ValueNetwork(online.value, config, policy, mesh)
    networks = Networks(policy.model, reference_model(config, policy), value.model, options.temperature)
    scorer = scorer_from_config(config, policy, mesh, cut)
    make_state = functools.partial(
        init_state,
        model=policy.model,
        kl_coefficient=online.kl_coefficient,
        optimizer=optimizer.transformation,
        ema_decay=config.optim.ema,
    )

    def first_params() -> PyTree:
        return value.join(policy.init_params(mesh, key))

    abstract = abstract_on_mesh(make_state, mesh, value.abstract(policy.model.abstract_params()), key)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def first_state() -> TrainState:
        build = jit_step(make_state, mesh, in_shardings=None, out_shardings=places, donate=(0,))
        return build(first_params(), key)

    if jax.process_index() == 0:
        policy.describe(workdir / "model")
    collector = Collector(
        policy=policy,
        options=options,
        row_length=config.data.max_length,
        scorer=scorer,
        mesh=mesh,
        reference_params=policy.init_params(mesh, key) if config.rollout.reference == "frozen" else {},
        experience=jit_step(
            functools.partial(experience_of, networks=networks),
            mesh,
            in_shardings=(None, None, batch_sharding(mesh), None),
            out_shardings=(batch_sharding(mesh), replicated(mesh)),
        ),
    )
    learn = jit_step(
        functools.partial(
            online.train_step,
            networks=networks,
            optimizer=optimizer.transformation,
            schedule=optimizer.schedule,
            ema_decay=config.optim.ema,
        ),
        mesh,
        in_shardings=(places, batch_sharding(mesh), None),
        out_shardings=(places, replicated(mesh)),
        donate=(0,),
    )

    def train_step(state: TrainState, arrays: dict[str, np.ndarray]) -> tuple[TrainState, Metrics]:
        asked = [prompts.at(place) for place in arrays["places"].tolist()]
        seed = step_seed(config.seed, int(state.step))
        params = combine(state.params, state.frozen)
        experience, metrics = collector.collect(
            params, state.opt_state["kl_coefficient"], asked, seed, cut.micro_batches
        )
        kl = metrics["kl"].sum / metrics["kl"].count
        state, learnt = learn(state, experience, kl)
        return state, {**{f"train/{name}": metric for name, metric in metrics.items()}, **learnt}

    return Task(
        steps=steps,
        init_state=first_state,
        abstract_state=abstract,
        rows=_Stream(
            Loader(prompts.sources, rows_per_step=config.train.rows_per_step, seed=config.seed), scorer
        ),
        put=lambda arrays: arrays,
        train_step=train_step,
        evaluate=functools.partial(_evaluate, collector=collector, prompts=held_out) if held_out else None,
        sample=functools.partial(_samples, collector=collector, prompts=held_out[:16]) if held_out else None,
        flops_per_token=flops_per_token(policy.model.config, config.data.max_length),
    )


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's answers, from the run's."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0] >> 1)


def _evaluate(state: TrainState, *, collector: Collector, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Scores of answers to the held-out prompts, always drawn with the same random numbers; the standard error is over
    prompts, for the answers to one are not independent."""
    answered = collector.answers(combine(state.params, state.frozen), prompts, EVAL_SEED)
    rollouts, scored = answered.rollouts, answered.scored
    by_prompt = scored.scores.reshape(len(prompts), -1).mean(axis=1)
    values = {
        "eval/score": float(scored.scores.mean()),
        "eval/score_standard_error": float(by_prompt.std() / max(len(prompts) - 1, 1) ** 0.5),
        "eval/no_end": float(1 - rollouts.ended.mean()),
        "eval/answer_tokens": float(np.mean([answer.size for answer in rollouts.answers])),
    }
    return values | {f"eval/score/{name}": float(found.mean()) for name, found in scored.components.items()}


def _samples(state: TrainState, *, collector: Collector, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The first held-out prompts with their answers and scores, for `samples.jsonl`."""
    answered = collector.answers(combine(state.params, state.frozen), prompts, EVAL_SEED)
    rollouts, scored = answered.rollouts, answered.scored
    texts = rollouts.texts(collector.policy.tokenizer)
    return [
        {
            "prompt": prompt.row.get("messages") or prompt.row.get("prompt"),
            "answer": text,
            "score": float(score),
            "finish_reason": "stop" if ended else "length",
            "tokens": int(answer.size),
        }
        for prompt, text, score, ended, answer in zip(
            rollouts.prompts, texts, scored.scores, rollouts.ended, rollouts.answers, strict=True
        )
    ]
