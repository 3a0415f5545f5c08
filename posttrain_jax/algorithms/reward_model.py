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
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.algorithms.contract import PreferenceAlgorithm, PreferenceSetup, Steps
from posttrain_jax.algorithms.reward_scale import set_scale
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.schema import check, setting
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import (
    Array,
    LossOutput,
    Metric,
    Metrics,
    Panel,
    PreferenceBatch,
    ProgressField,
    PyTree,
    TrainState,
)
from posttrain_jax.core.updates import eval_sums, new_state, padding_metrics, update, used_micro_batches
from posttrain_jax.data.preference_rows import Preferences
from posttrain_jax.forward.completions import decided_weights, reward_scores
from posttrain_jax.losses import reward as losses
from posttrain_jax.models.io.source import is_reward_model
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.spec import ModelSpec, is_trained
from posttrain_jax.models.transformer import Model
from posttrain_jax.run import curves, progress

PROGRESS = (
    ProgressField("loss {:.4f}", ("train/loss",)),
    ProgressField("accuracy {:.1%}", ("train/accuracy",)),
    ProgressField("margin {:.3f}", ("train/margins",)),
    *progress.RATES,
)
PANELS = (
    Panel("loss (mean over comparisons)", ("train/loss", "eval/loss")),
    Panel("accuracy (share of comparisons)", ("train/accuracy", "eval/reward_accuracy")),
    Panel("score margin, chosen less rejected", ("train/margins", "eval/margins")),
    Panel("score", ("train/scores/chosen", "train/scores/rejected")),
    *curves.TRAINING,
)


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


LOSSES: Mapping[str, Callable[[Scored, Options], LossOutput]] = {
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


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `reward` of a config. `seed` is no key: the run's, for the draws of the bootstrap."""

    loss: str = setting("bradley_terry", "the loss (losses/reward.py)", choices=tuple(LOSSES))
    head_init: str = setting(
        "normal",
        "start of the score head: standard deviation 1 / sqrt(d_model + 1), or 0",
        choices=("normal", "zeros"),
    )
    label_smoothing: float = setting(0.0, "smoothed_label: how likely a label is wrong", below=0.5)
    center: float = setting(0.0, "coefficient of (r_w + r_l)^2, which keeps scores near 0")
    margin_scale: float = setting(1.0, "margin: the data's margins are multiplied by it")
    normalize: str = setting(
        "demonstrations",
        "scale of the scores after the last step: as trained; the preferred completions have mean 0; or all have "
        "mean 0 and variance 1",
        choices=("none", "demonstrations", "unit"),
    )
    members: int = setting(1, "models of the ensemble; 1 = a single model", minimum=1, maximum=1000)
    bootstrap: bool = setting(
        True, "each member counts each prompt as often as it was drawn, with replacement"
    )
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, "reward")
        if self.loss == "smoothed_label" and not self.label_smoothing:
            raise InputError(
                "reward.loss=smoothed_label with reward.label_smoothing=0 is bradley_terry; set it, to 0.1 for example."
            )
        if self.loss != "smoothed_label" and self.label_smoothing:
            raise InputError(
                f"reward.label_smoothing is set, and reward.loss={self.loss} does not look at it; use smoothed_label."
            )
        if self.loss != "margin" and self.margin_scale != 1:
            raise InputError(
                f"reward.margin_scale is {self.margin_scale:g}, and reward.loss={self.loss} does not look at it; use "
                "margin."
            )
        if self.loss == "regression" and self.center:
            raise InputError(
                "reward.center keeps pairs of scores near 0, and reward.loss=regression has no pairs."
            )
        if self.loss == "regression" and self.normalize == "unit":
            raise InputError(
                "reward.normalize=unit would change the ratings that reward.loss=regression predicts; set it to none."
            )


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

    def gather(values_BN: Array, indices_BP: Array) -> Array:
        return jnp.take_along_axis(values_BN, indices_BP, axis=1)

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


def prompt_draws(batch: PreferenceBatch, member: Array, options: Options) -> Array:
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
        return score_losses(scores_BN, batch, prompt_draws(batch, member, options), options)

    if options.members == 1:
        total, metrics = one(params, jnp.int32(0))
    else:
        totals, by_member = jax.vmap(one)(params["members"], jnp.arange(options.members, dtype=jnp.int32))
        # Each member's mean counts alike: sums over members, divided by one member's count on average.
        total = jnp.sum(totals)
        metrics = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), by_member)
        metrics["loss"] = Metric(total / options.members, metrics["loss"].count)
        metrics = jax.lax.stop_gradient(metrics)
    metrics |= {
        "pairs": Metric(jnp.sum(batch.weights != 0, dtype=jnp.float32), jnp.float32(1)),
        **padding_metrics(batch.segment_ids),
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
) -> TrainState:
    """Puts a score head on the transformer (or keeps the one there is), splits trained from frozen, and copies what
    is trained for every member; a member's head, and its adapters, are drawn with a key of its own."""
    body = {name: part for name, part in params.items() if name not in ("head", "score_head")}
    given = _unscaled(params["score_head"], options) if "score_head" in params else None

    def trained_of(member: int) -> PyTree:
        own = jax.random.fold_in(key, member)
        drawn = score_head_params(own, model.config.d_model, init=options.head_init)
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
    """The head of a normalized reward model, on the scale that is trained: its gain becomes part of the kernel, and
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

    return update(
        state,
        loss_sum,
        batch,
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=ema_decay,
        used=used_micro_batches(batch.segment_ids),
    )


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

    return {f"eval/{name}": metric for name, metric in eval_sums(micro_metrics, batch).items()}


def check_model(options: Options, spec: ModelSpec) -> None:
    """Whether the members of an ensemble can differ.

    Raises:
      InputError: they would all start with the same head or adapter.
    """
    if options.members == 1:
        return
    if spec.source is not None and is_reward_model(spec.source):
        raise InputError(
            f"model.init={spec.source.name} is a reward model, whose head every member would start with, and "
            "reward.members above 1 needs heads that differ; start from a language model."
        )
    spec.require_new_adapter("reward.members above 1")


def steps(options: Options, setup: PreferenceSetup) -> Steps[PreferenceBatch]:
    """The functions above, bound to a model."""
    model, data = setup.spec.model, setup.data
    options = dataclasses.replace(options, seed=setup.seed)
    bind = functools.partial(
        functools.partial, model=model, options=options, share_prompt=data.shape.share_prompt
    )
    finish = None
    if options.normalize != "none" and options.loss != "regression":
        finish = functools.partial(
            set_scale,
            scores_of=functools.partial(setup.map_completions, bind(member_scores)),
            sources=data.train.sources,
            normalize=options.normalize,
        )
    return Steps(
        make_state=functools.partial(init_state, model=model, options=options),
        train_step=bind(train_step),
        eval_step=bind(eval_step),
        train=data.train_rows(),
        held_out=data.held_out_rows(),
        batch=PreferenceBatch,
        row_tokens=data.shape.length,
        progress=PROGRESS,
        panels=PANELS,
        finish=finish,
        members=options.members,
    )


def check_data(options: Options, data: Preferences) -> None:
    """Raises InputError for data that the loss cannot learn from."""
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
    for source in (*sources, *data.held_out_sources):
        name = source.report.source
        if options.loss == "regression" and not source.report.rated:
            raise InputError(f"{name} holds no rating, and reward.loss=regression needs them.")
        if options.loss != "regression" and not source.report.comparisons:
            raise InputError(
                f"{name} holds no comparison of two completions (ties and single completions are none), and "
                f"reward.loss={options.loss} needs them; ratings are for reward.loss=regression."
            )


ALGORITHM = PreferenceAlgorithm(
    section="reward",
    options=Options,
    steps=steps,
    check_model=check_model,
    check_data=check_data,
    is_reward=True,
)
