"""Reward models: the transformer with a scalar head, trained so that what people preferred scores higher.

The step, from top to bottom: prompts with their completions, packed into rows -> hidden states, the prompt's once ->
the score at every completion's last token -> a loss of `losses/reward.py` over comparisons, rankings or ratings ->
gradient sums over the micro-batches that are not empty -> one division by the global count -> clip, optimizer, EMA.

A comparison loss does not see a constant added to all scores, so after the last step the head's gain and bias are set
by `reward.normalize` and stored with the model: "demonstrations" = the preferred completions score 0 on average
(InstructGPT, arXiv:2203.02155, section 3.5), "unit" = all completions have mean 0 and variance 1 (Ziegler et al. 2019,
arXiv:1909.08593), "none". Held-out losses stay on the scale that was trained. A regression predicts the ratings
themselves, so its scores are left as they are.

An ensemble (`reward.members` above 1) trains k models in one run, vmapped over their parameters: each has a head of
its own draw (and, with LoRA, adapters of its own on one trunk) and its own bootstrap of the prompts (Christiano et al.
2017, arXiv:1706.03741; Coste et al. 2023, arXiv:2310.02743).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import (
    Array,
    LossOutput,
    Metric,
    Metrics,
    PreferenceBatch,
    PyTree,
    Task,
    TrainState,
)
from posttrain_jax.core.updates import (
    apply_gradients,
    gradient_sums,
    map_micro_batches,
    new_state,
    used_micro_batches,
)
from posttrain_jax.data.preference_groups import Group
from posttrain_jax.data.preference_rows import PreferenceRows
from posttrain_jax.forward.completions import decided_weights, map_completions, reward_scores
from posttrain_jax.losses import reward as losses
from posttrain_jax.models.io.source import is_reward_model
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import Model
from posttrain_jax.wiring.data import Preferences, preferences_from_config
from posttrain_jax.wiring.experiment import (
    ModelSpec,
    Offline,
    is_trained,
    mesh_from_config,
    micro_batches,
    model_spec_from_config,
    task_from_config,
)

NORMALIZE = ("none", "demonstrations", "unit")


@dataclasses.dataclass(frozen=True)
class Options:
    """The loss and its numbers.

    Attributes:
      loss: a name in LOSSES.
      label_smoothing: of "smoothed": how likely a label is wrong.
      center: coefficient of (r_w + r_l)^2, which keeps scores near 0 (TRL's center regularization).
      margin_scale: the data's margins are multiplied by it ("margin").
      members: of the ensemble; 1 = a single model.
      bootstrap: each member counts each prompt as often as it was drawn, with replacement.
      seed: of the draws.
    """

    loss: str
    label_smoothing: float
    center: float
    margin_scale: float
    members: int
    bootstrap: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of rows and of the two completions of each comparison, and what the losses need beside them.

    A comparison whose soft label is 1/2 has a weight under "soft_label" alone. `prompt_weights_BN` is how often a
    completion's prompt was drawn.
    """

    scores_BN: Array
    chosen_BP: Array
    rejected_BP: Array
    weights_BP: Array
    prompt_weights_BN: Array
    batch: PreferenceBatch


def _by_prompt(scored: Scored) -> tuple[Array, Array, Array, Array]:
    """Scores, ranks and presence of each prompt's completions `[B, N, N]` (prompt, completion), and prompts' weights.

    Ranks are what the data say, also of completions that are the same tokens, which no comparison is kept of. A prompt
    weighs as much as the heaviest of its comparisons (its row's `weight`), so one without any has no loss.
    """
    batch = scored.batch
    count = batch.last_token_index.shape[1]
    numbers_N = jnp.arange(1, count + 1)
    mask_BNN = (batch.group_ids[:, None, :] == numbers_N[None, :, None]) & (batch.sequence_ids != 0)[
        :, None, :
    ]
    tiled = functools.partial(jnp.broadcast_to, shape=mask_BNN.shape)
    heaviest_BN = jax.vmap(lambda worse, weight: jnp.zeros((count,)).at[worse].max(weight))(
        batch.worse, scored.weights_BP
    )
    weights_BN = jnp.max(jnp.where(mask_BNN, heaviest_BN[:, None, :], 0.0), axis=-1)
    return tiled(scored.scores_BN[:, None, :]), tiled(batch.ranks[:, None, :]), mask_BNN, weights_BN


def _kwise(scored: Scored, options: Options) -> LossOutput:
    scores, ranks, mask, weights = _by_prompt(scored)
    return losses.kwise_loss(scores, ranks, mask, weights_B=weights)


def _plackett_luce(scored: Scored, options: Options) -> LossOutput:
    scores, ranks, mask, weights = _by_prompt(scored)
    return losses.plackett_luce_loss(scores, ranks, mask, weights_B=weights)


def _regression(scored: Scored, options: Options) -> LossOutput:
    rated = ~jnp.isnan(scored.batch.ratings) & (scored.batch.sequence_ids != 0)
    weights_BN = jnp.where(rated, scored.prompt_weights_BN, 0.0)
    return losses.regression_loss(scored.scores_BN, scored.batch.ratings, weights_B=weights_BN)


RewardLoss = Callable[[Scored, Options], LossOutput]

LOSSES: dict[str, RewardLoss] = {
    "bradley_terry": lambda s, o: losses.bradley_terry_loss(
        s.chosen_BP, s.rejected_BP, weights_B=s.weights_BP
    ),
    "margin": lambda s, o: losses.margin_loss(
        s.chosen_BP, s.rejected_BP, o.margin_scale * s.batch.margins, weights_B=s.weights_BP
    ),
    "soft_label": lambda s, o: losses.soft_label_loss(
        s.chosen_BP, s.rejected_BP, s.batch.probabilities, weights_B=s.weights_BP
    ),
    "smoothed_label": lambda s, o: losses.smoothed_label_loss(
        s.chosen_BP, s.rejected_BP, label_smoothing=o.label_smoothing, weights_B=s.weights_BP
    ),
    "kwise": _kwise,
    "plackett_luce": _plackett_luce,
    "regression": _regression,
}
BY_PROMPT = ("kwise", "plackett_luce")


def score_losses(
    scores_BN: Array, batch: PreferenceBatch, counts_BN: Array, options: Options
) -> tuple[Array, Metrics]:
    """Sum of the losses of rows `[B, ...]` given their scores (differentiable), and metrics.

    Args:
      scores_BN: of the completions.
      batch: the rows.
      counts_BN: how often this member drew the completion's prompt (1 without a bootstrap).
      options: the loss.
    """

    def gather(values_BN: Array, places_BP: Array) -> Array:
        return jnp.take_along_axis(values_BN, places_BP, axis=1)

    weights_BP = batch.weights if options.loss == "soft_label" else decided_weights(batch)
    scored = Scored(
        scores_BN=scores_BN,
        chosen_BP=gather(scores_BN, batch.better),
        rejected_BP=gather(scores_BN, batch.worse),
        weights_BP=weights_BP * gather(counts_BN, batch.better),
        prompt_weights_BN=counts_BN,
        batch=batch,
    )
    output = LOSSES[options.loss](scored, options)
    total = jnp.sum(output.loss)
    if options.center:
        # A mean over what the loss is a mean over: comparisons, or prompts with all of theirs.
        share_BP = batch.shares if options.loss in BY_PROMPT else 1.0
        penalty = losses.center_penalty(
            scored.chosen_BP,
            scored.rejected_BP,
            coefficient=options.center,
            weights_B=share_BP * scored.weights_BP,
        )
        total = total + jnp.sum(penalty.loss)
    metrics = dict(output.metrics) | {"loss": Metric(total, output.count)}
    return total, jax.lax.stop_gradient(metrics)


def draws_of(batch: PreferenceBatch, member: Array, options: Options) -> Array:
    """How often a member's bootstrap drew each completion's prompt, `[B, N]` float32.

    Poisson(1) counts, the limit of drawing as many prompts as there are with replacement (Oza and Russell 2001), drawn
    from the number of the prompt's first completion, so that they are the same in every epoch and on every mesh.
    """
    if options.members == 1 or not options.bootstrap:
        return jnp.ones(batch.sequence_ids.shape, jnp.float32)
    first_BN = jnp.min(
        jnp.where(
            batch.group_ids[:, :, None] == batch.group_ids[:, None, :],
            batch.sequence_ids[:, None, :],
            jnp.iinfo(jnp.int32).max,
        ),
        axis=-1,
    )
    key = jax.random.fold_in(jax.random.key(options.seed), member)
    keys = jax.vmap(jax.vmap(lambda number: jax.random.fold_in(key, number)))(first_BN)
    return jax.vmap(jax.vmap(lambda k: jax.random.poisson(k, 1.0)))(keys).astype(jnp.float32)


def reward_losses(
    params: PyTree,
    frozen: PyTree,
    batch: PreferenceBatch,
    *,
    model: Model,
    options: Options,
    share_prompt: bool,
) -> tuple[Array, Metrics]:
    """Sum over rows `[B, ...]` (and over members) of the loss, and metrics (of an ensemble: means over members)."""

    def one(params: PyTree, member: Array) -> tuple[Array, Metrics]:
        head = params["score_head"]
        fixed = {name: jax.lax.stop_gradient(head[name]) for name in ("gain", "bias")}
        whole = combine({**params, "score_head": {**head, **fixed}}, frozen)
        scores_BN = reward_scores(whole, batch, model=model, share_prompt=share_prompt)
        return score_losses(scores_BN, batch, draws_of(batch, member, options), options)

    if options.members == 1:
        total, metrics = one(params, jnp.int32(0))
    else:
        totals, by_member = jax.vmap(one)(params["members"], jnp.arange(options.members, dtype=jnp.int32))
        # Each member's mean counts alike: sums over members, divided by one member's count on average.
        total = jnp.sum(totals)
        metrics = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), by_member)
        metrics["loss"] = Metric(total / options.members, metrics["loss"].count)
        metrics = jax.lax.stop_gradient(metrics)
    real = jnp.sum(batch.segment_ids != 0, dtype=jnp.float32)
    metrics |= {
        "pairs": Metric(jnp.sum(batch.weights != 0, dtype=jnp.float32), jnp.float32(1)),
        "tokens": Metric(real, jnp.float32(1)),
        "padding_share": Metric(jnp.float32(batch.tokens.size) - real, jnp.float32(batch.tokens.size)),
    }
    return total, metrics


def init_state(
    params: PyTree,
    key: Array,
    *,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
    options: Options,
    head_init: str,
) -> TrainState:
    """Puts a score head on the transformer (or keeps the one there is), splits trained from frozen, and copies what
    is trained for every member; a member's head, and its adapters, are drawn with a key of its own."""
    body = {name: part for name, part in params.items() if name not in ("head", "score_head")}
    given = _unscaled(params["score_head"], options) if "score_head" in params else None

    def trained_of(member: int) -> PyTree:
        own = jax.random.fold_in(key, member)
        drawn = score_head_params(own, model.config.d_model, init=head_init)
        head = drawn if given is None else given
        trained = partition(body, lambda path: is_trained(path, model))[0]
        if model.lora.rank and options.members > 1:
            trained = partition(model.init(own), lambda path: is_trained(path, model))[0]
        return {**trained, "score_head": head}

    frozen = partition(body, lambda path: is_trained(path, model))[1]
    if options.members == 1:
        trained = trained_of(0)
    else:
        members = [trained_of(member) for member in range(options.members)]
        trained = {"members": jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)}
    return new_state(trained, frozen, key, optimizer, ema=ema_decay > 0)


def _unscaled(head: PyTree, options: Options) -> PyTree:
    """A head that has a normalization already, on the scale that is trained: its gain becomes part of the kernel, and
    only a regression keeps its bias, which comparisons do not see."""
    kernel = (head["gain"] * head["kernel"]).astype(head["kernel"].dtype)
    bias = head["bias"] if options.loss == "regression" else jnp.zeros_like(head["bias"])
    return {"kernel": kernel, "gain": jnp.ones_like(head["gain"]), "bias": bias}


def train_step(
    state: TrainState,
    batch: PreferenceBatch,
    *,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    options: Options,
    share_prompt: bool,
) -> tuple[TrainState, Metrics]:
    """One step on a global batch `[M, B, ...]`. The gradient norm, and its clipping, is of all members together."""

    def loss_sum(params: PyTree, micro: PreferenceBatch) -> tuple[Array, Metrics]:
        return reward_losses(
            params, state.frozen, micro, model=model, options=options, share_prompt=share_prompt
        )

    used = used_micro_batches(batch.segment_ids)
    gradients, metrics = gradient_sums(loss_sum, state.params, batch, used=used)
    loss = metrics["loss"]
    lr = schedule(state.step - state.skipped)  # the optimizer does not count skipped steps
    state, update_metrics = apply_gradients(
        state, gradients, loss.sum, optimizer=optimizer, count=loss.count, ema_decay=ema_decay
    )
    sums = {"pairs", "tokens"}
    named = {
        f"train/{name}": Metric.of(metric.sum) if name in sums else metric for name, metric in metrics.items()
    }
    return state, {**named, **update_metrics, "train/lr": Metric.of(lr)}


def member_scores(
    params: PyTree, batch: PreferenceBatch, *, model: Model, options: Options, share_prompt: bool
) -> Array:
    """Every member's score of every completion, `[B, N, E]`, of parameters that trained and frozen are joined in."""
    score = functools.partial(reward_scores, batch=batch, model=model, share_prompt=share_prompt)
    if options.members == 1:
        return score(params)[..., None]
    members = params["members"]
    shared = {name: part for name, part in params.items() if name != "members"}
    return jax.vmap(lambda one: score(combine(one, shared)), out_axes=-1)(members)


def eval_step(
    params: PyTree, batch: PreferenceBatch, *, model: Model, options: Options, share_prompt: bool
) -> Metrics:
    """Held-out metrics on rows `[M, B, ...]`, per comparison; an ensemble is judged by its mean score.

    The loss and its metrics are of the scores as they were trained, without the normalization.
    """
    head = (params if options.members == 1 else params["members"])["score_head"]
    gain_11E, bias_11E = (jnp.reshape(head[name], (1, 1, -1)) for name in ("gain", "bias"))

    def micro_metrics(micro: PreferenceBatch) -> Metrics:
        scores_BNE = member_scores(params, micro, model=model, options=options, share_prompt=share_prompt)
        scores_BN = jnp.mean(scores_BNE, axis=-1)
        trained_BNE = scores_BNE
        if options.loss != "regression":
            trained_BNE = (scores_BNE - bias_11E) / gain_11E
        trained_BN = jnp.mean(trained_BNE, axis=-1)
        metrics = score_losses(trained_BN, micro, jnp.ones_like(trained_BN), options)[1]
        metrics.pop("accuracy", None)  # of a comparison loss it is `reward_accuracy`
        better = jnp.take_along_axis(scores_BN, micro.better, axis=1)
        worse = jnp.take_along_axis(scores_BN, micro.worse, axis=1)
        weights = decided_weights(micro)
        accuracy = Metric(jnp.sum(weights * (better > worse)), jnp.sum(weights))
        metrics["reward_accuracy"] = accuracy
        if options.members > 1:
            present = micro.sequence_ids != 0
            spread = jnp.where(present, jnp.std(scores_BNE, axis=-1), 0.0)
            metrics["disagreement"] = Metric(jnp.sum(spread), jnp.sum(present, dtype=jnp.float32))
        return metrics

    stacked = map_micro_batches(micro_metrics, batch, used_micro_batches(batch.segment_ids))
    metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)
    return {f"eval/{name}": metric for name, metric in metrics.items()}


def from_config(config: Config, workdir: Path) -> Task:
    """Everything the training loop needs, from an experiment's config.

    Raises:
      InputError: a bad value, a bad row, a model that cannot be used.
    """
    options = options_from_config(config)
    mesh = mesh_from_config(config)
    policy = model_spec_from_config(config, reward=True)
    model = policy.model
    if options.members > 1 and policy.source is not None and is_reward_model(policy.source):
        raise InputError(
            f"model.init={policy.source.name} is a reward model, whose head every member would start with, and "
            "reward.members above 1 needs heads that differ; start from a language model."
        )
    data = preferences_from_config(config, policy.tokenizer, workdir, attention=model.module.implementation)
    _check_data(data, options)
    if options.members > 1:
        policy.require_new_adapter("reward.members above 1")
    share = data.shape.share_prompt
    held_out = data.held_out.sources if data.held_out is not None else ()
    algorithm = Offline(
        make_state=functools.partial(
            init_state, model=model, options=options, head_init=config.reward.head_init
        ),
        train_step=functools.partial(train_step, model=model, options=options, share_prompt=share),
        eval_step=functools.partial(eval_step, model=model, options=options, share_prompt=share),
        train=[PreferenceRows(source, data.shape) for source in data.train.sources],
        held_out=[PreferenceRows(source, data.eval_shape) for source in held_out],
        batch=PreferenceBatch,
        row_tokens=data.shape.length,
        is_reward=True,
        finish=_normalization(config, policy, data, options, mesh)
        if config.reward.normalize != "none" and options.loss != "regression"
        else None,
    )
    return task_from_config(config, workdir, policy, mesh, algorithm)


def options_from_config(config: Config) -> Options:
    """The loss and its numbers.

    Raises:
      InputError: an unknown loss, normalization or start of the head; a number out of its range.
    """
    reward = config.reward
    if reward.loss not in LOSSES:
        raise InputError(f"reward.loss is {reward.loss!r}; use one of {', '.join(LOSSES)}.")
    if reward.normalize not in NORMALIZE:
        raise InputError(f"reward.normalize is {reward.normalize!r}; use one of {', '.join(NORMALIZE)}.")
    if not 0 <= reward.label_smoothing < 0.5:
        raise InputError(
            f"reward.label_smoothing is {reward.label_smoothing}; it must be from 0 to below 0.5."
        )
    _check_use(reward)
    if reward.members < 1:
        raise InputError(f"reward.members is {reward.members}; it must be 1 (a single model) or more.")
    return Options(
        loss=reward.loss,
        label_smoothing=reward.label_smoothing,
        center=reward.center,
        margin_scale=reward.margin_scale,
        members=reward.members,
        bootstrap=reward.bootstrap,
        seed=config.seed,
    )


def _check_use(reward: Config) -> None:
    """A number that the loss needs is set, and none that it would ignore."""
    if reward.loss == "smoothed_label" and not reward.label_smoothing:
        raise InputError(
            "reward.loss=smoothed_label with reward.label_smoothing=0 is bradley_terry; set it, to 0.1 for example."
        )
    if reward.loss != "smoothed_label" and reward.label_smoothing:
        raise InputError(
            f"reward.label_smoothing is set, and reward.loss={reward.loss} does not look at it; use smoothed_label."
        )
    if reward.loss != "margin" and reward.margin_scale != 1:
        raise InputError(
            f"reward.margin_scale is {reward.margin_scale}, and reward.loss={reward.loss} does not look at it; use "
            "margin."
        )
    if reward.loss == "regression" and reward.center:
        raise InputError(
            "reward.center keeps pairs of scores near 0, and reward.loss=regression has no pairs."
        )
    if reward.loss == "regression" and reward.normalize == "unit":
        raise InputError(
            "reward.normalize=unit would change the ratings that reward.loss=regression predicts; set it to none."
        )


def _check_data(data: Preferences, options: Options) -> None:
    sources = data.train.sources
    if options.loss == "margin" and not any(source.arrays.margin.any() for source in sources):
        raise InputError("reward.loss=margin needs margins, and data.train holds none; use bradley_terry.")
    if options.loss == "soft_label" and all((source.arrays.probability == 1).all() for source in sources):
        raise InputError(
            "reward.loss=soft_label needs probabilities below 1, and data.train holds none; use bradley_terry."
        )
    if options.loss != "soft_label" and any((source.arrays.probability < 1).any() for source in sources):
        log_on_host0(
            f"data.train holds soft labels, which reward.loss={options.loss} takes for hard ones (those of 1/2 are "
            "left out); reward.loss=soft_label looks at them."
        )
    for part in (data.train, data.held_out):
        for source in part.sources if part is not None else ():
            name = source.report.source
            if options.loss == "regression" and not source.report.rated:
                raise InputError(f"{name} holds no rating, and reward.loss=regression needs them.")
            if options.loss != "regression" and not source.report.comparisons:
                raise InputError(
                    f"{name} holds no comparison of two completions (ties and single completions are none), and "
                    f"reward.loss={options.loss} needs them; ratings are for reward.loss=regression."
                )


def _normalization(
    config: Config, policy: ModelSpec, data: Preferences, options: Options, mesh: Mesh
) -> Callable[[TrainState], TrainState]:
    """Sets every member's gain and bias from its scores of the training data; those of the EMA from the EMA's."""
    score = functools.partial(
        member_scores, model=policy.model, options=options, share_prompt=data.shape.share_prompt
    )

    def scores_of(params: PyTree) -> Array:
        """`[N, E]`: of the completions that the scale is set by, by every member."""
        taken = []
        for source in data.train.sources:
            scores_SE = map_completions(
                score,
                params,
                source,
                data.shape,
                mesh,
                groups=config.train.rows_per_step,
                micro_batches=micro_batches(config, mesh),
            )
            places = [
                group.first_sequence + k
                for group in (source.group(i) for i in range(len(source)))
                for k in _reference_places(group, config.reward.normalize)
            ]
            taken.append(scores_SE[places])
        return jnp.asarray(np.concatenate(taken))

    def normalized(trained: PyTree, frozen: PyTree) -> PyTree:
        scores_NE = scores_of(combine(trained, frozen))
        scale_of = functools.partial(_rescaled, normalize=config.reward.normalize)
        if options.members == 1:
            return {**trained, "score_head": _with_scale(trained["score_head"], scale_of, scores_NE[:, 0])}
        members = trained["members"]
        scale_of = jax.vmap(scale_of, in_axes=(0, 0, 1))
        return {"members": {**members, "score_head": _with_scale(members["score_head"], scale_of, scores_NE)}}

    def finish(state: TrainState) -> TrainState:
        log_on_host0(f"Scores are normalized ({config.reward.normalize}) over {len(data.train):,} prompts.")
        return dataclasses.replace(
            state,
            params=normalized(state.params, state.frozen),
            ema=normalized(state.ema, state.frozen) if state.ema else state.ema,
        )

    return finish


def _rescaled(gain: Array, bias: Array, scores_N: Array, *, normalize: str) -> tuple[Array, Array]:
    """The gain and bias that move these scores, made with the old ones, to where `reward.normalize` wants them."""
    if normalize == "unit":
        scale = losses.gain_and_bias(scores_N)
        return scale.gain * gain, scale.gain * bias + scale.bias
    return gain, bias + losses.demonstration_bias(scores_N)


def _with_scale(head: PyTree, scale_of: Callable[..., tuple[Array, Array]], scores: Array) -> PyTree:
    """The head with a new gain and bias, in their places on the mesh."""
    gain, bias = scale_of(np.asarray(head["gain"]), np.asarray(head["bias"]), scores)
    return {
        **head,
        "gain": jax.device_put(gain, head["gain"].sharding),
        "bias": jax.device_put(bias, head["bias"].sharding),
    }


def _reference_places(group: Group, normalize: str) -> list[int]:
    """The completions that the scale is set by: all, or those that no other was preferred to."""
    if normalize == "unit" or not group.comparisons:
        return list(range(len(group.sequences)))
    return np.flatnonzero(group.ranks == 0).tolist()
