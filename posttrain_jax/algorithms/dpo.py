"""Direct preference optimization and its family: raise what people preferred above what they did not, without a
reward model and without sampling.

The step, from top to bottom: prompts with their completions, packed into rows -> hidden states, the prompt's once ->
log-probability of every completion -> the two of every comparison -> a loss of `losses/dpo.py` (or of its
reference-free siblings) -> gradient sums over the micro-batches that are not empty -> one division by the global
weight of the comparisons -> clip, optimizer, EMA, unless something is not finite.

The reference is the model that training starts from, or `dpo.reference_model`. By `dpo.reference` its log-probabilities
are

    cached    computed before the first step and kept on disk (posttrain_jax/forward/reference_cache.py); the default
    memory    computed in every step by parameters of its own
    adapter   computed in every step by the same parameters with the LoRA adapter left out
    none      not there, as for all losses that need no reference

What bfloat16 gives for a completion depends on its place in a row (SmolLM2-135M: by up to half a nat), so that after
the first step `cached` adds such noise to the log-ratios of training, though not of evaluations; `memory` adds none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PreTrainedTokenizerBase

from posttrain_jax.algorithms.contract import PreferenceAlgorithm, PreferenceSetup, Steps
from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.schema import check, setting
from posttrain_jax.core.trees import combine
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
from posttrain_jax.core.updates import TOTALS, eval_sums, padding_metrics, update, used_micro_batches
from posttrain_jax.data.preference_groups import PreferenceSource
from posttrain_jax.data.preference_rows import Preferences
from posttrain_jax.data.spans import ChatTemplate
from posttrain_jax.forward.completions import decided_weights, policy_logps
from posttrain_jax.losses import anchored, reference_free
from posttrain_jax.losses import dpo as losses
from posttrain_jax.models.spec import init_state
from posttrain_jax.models.transformer import Model
from posttrain_jax.run import curves, progress

PROGRESS = (
    ProgressField("loss {:.4f}", ("train/loss",)),
    ProgressField("accuracy {:.1%}", ("train/rewards/accuracies",)),
    ProgressField("margin {:.3f}", ("train/rewards/margins",)),
    *progress.RATES,
)
PANELS = (
    Panel("loss (mean over pairs)", ("train/loss", "eval/loss")),
    Panel("reward accuracy (share of pairs)", ("train/rewards/accuracies", "eval/reward_accuracy")),
    Panel("reward margin (beta x nats)", ("train/rewards/margins", "eval/rewards/margins")),
    Panel("log-probability (nats per completion)", ("train/logps/chosen", "train/logps/rejected")),
    *curves.TRAINING,
)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The two completions of every comparison, float32 `[B, P]` each; see `PreferenceBatch`.

    Log-probabilities are sums over trained tokens, lengths their number.
    """

    chosen: Array
    rejected: Array
    reference_chosen: Array
    reference_rejected: Array
    chosen_lengths: Array
    rejected_lengths: Array
    margins: Array
    weights: Array
    chosen_nll: Array
    nll_lengths: Array

    @property
    def logps(self) -> tuple[Array, Array, Array, Array]:
        """The four log-probabilities, as the losses take them."""
        return self.chosen, self.rejected, self.reference_chosen, self.reference_rejected

    @property
    def lengths(self) -> tuple[Array, Array]:
        """Chosen and rejected."""
        return self.chosen_lengths, self.rejected_lengths


LOSSES: Mapping[str, Callable[[Pairs, Options], LossOutput]] = {
    "dpo": lambda p, o: losses.dpo_loss(*p.logps, beta=o.beta, weights_B=p.weights),
    "cdpo": lambda p, o: losses.cdpo_loss(
        *p.logps, beta=o.beta, label_smoothing=o.label_smoothing, weights_B=p.weights
    ),
    "robust": lambda p, o: losses.robust_dpo_loss(
        *p.logps, beta=o.beta, label_smoothing=o.label_smoothing, weights_B=p.weights
    ),
    "ipo": lambda p, o: losses.ipo_loss(*p.logps, beta=o.beta, weights_B=p.weights),
    "ipo_mean": lambda p, o: losses.ipo_mean_loss(*p.logps, *p.lengths, beta=o.beta, weights_B=p.weights),
    "hinge": lambda p, o: losses.hinge_loss(*p.logps, beta=o.beta, weights_B=p.weights),
    "normalized": lambda p, o: losses.normalized_dpo_loss(
        *p.logps, *p.lengths, beta=o.beta, weights_B=p.weights
    ),
    "rdpo": lambda p, o: losses.rdpo_loss(
        *p.logps, *p.lengths, beta=o.beta, alpha=o.alpha, weights_B=p.weights
    ),
    "dpop": lambda p, o: losses.dpop_loss(*p.logps, beta=o.beta, lambda_=o.alpha, weights_B=p.weights),
    "exo": lambda p, o: losses.exo_loss(
        *p.logps, beta=o.beta, label_smoothing=o.label_smoothing, weights_B=p.weights
    ),
    "rpo": lambda p, o: losses.rpo_loss(
        *p.logps, p.margins, jnp.zeros_like(p.margins), beta=o.beta, eta=o.eta, weights_B=p.weights
    ),
    "apo_zero": lambda p, o: anchored.apo_zero_loss(*p.logps, beta=o.beta, weights_B=p.weights),
    "apo_down": lambda p, o: anchored.apo_down_loss(*p.logps, beta=o.beta, weights_B=p.weights),
    "nca": lambda p, o: anchored.nca_loss(*p.logps, beta=o.beta, weights_B=p.weights),
    "bco_pair": lambda p, o: anchored.bco_pair_loss(*p.logps, beta=o.beta, weights_B=p.weights),
    "sppo_hard": lambda p, o: anchored.sppo_hard_loss(*p.logps, beta=o.beta, weights_B=p.weights),
    "slic": lambda p, o: reference_free.slic_loss(
        p.chosen, p.rejected, p.chosen, delta=o.gamma, lambda_=o.alpha, weights_B=p.weights
    ),
    "simpo": lambda p, o: reference_free.simpo_loss(
        p.chosen, p.rejected, *p.lengths, beta=o.beta, gamma=o.gamma, weights_B=p.weights
    ),
    "orpo": lambda p, o: reference_free.orpo_loss(
        p.chosen, p.rejected, *p.lengths, lambda_=o.alpha, weights_B=p.weights
    ),
    "cpo": lambda p, o: reference_free.cpo_loss(
        p.chosen, p.rejected, p.chosen_lengths, beta=o.beta, alpha=o.alpha, weights_B=p.weights
    ),
}
REFERENCE_FREE = ("slic", "simpo", "orpo", "cpo")
# The losses that look at a number; the others refuse another value than the default.
USED_BY = {
    "label_smoothing": ("cdpo", "robust", "exo"),
    "alpha": ("rdpo", "dpop", "cpo", "orpo", "slic"),
    "gamma": ("simpo", "slic"),
    "eta": ("rpo",),
    "beta": tuple(loss for loss in LOSSES if loss not in ("slic", "orpo")),
}
# The losses that are not what they are called where it is 0.
NEEDED_BY = {
    "label_smoothing": ("cdpo", "robust", "exo"),
    "alpha": ("rdpo", "dpop", "cpo", "orpo"),
    "gamma": ("slic",),
    "eta": ("rpo",),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `dpo` of a config; each loss uses the numbers that its formula has.

    `end_ids` is no key: the tokens that end a turn, for `skip_eos`; a completion that was cut ends with another one,
    which stays.
    """

    loss: str = setting(
        "dpo", "the loss (losses/dpo.py, anchored.py, reference_free.py)", choices=tuple(LOSSES)
    )
    beta: float = setting(0.1, "strength of the pull to the reference, or the scale of the reward", above=0)
    label_smoothing: float = setting(
        0.0, "cdpo, robust: how likely a label is wrong; exo: its epsilon", below=0.5
    )
    gamma: float = setting(0.0, "simpo's target margin, slic's delta")
    alpha: float = setting(
        0.0,
        "weight of the second term: of the length difference (rdpo), of the penalty (dpop), of the likelihood "
        "(cpo), lambda (orpo, slic)",
    )
    eta: float = setting(1.0, "rpo's scale of the data's margins")
    nll_weight: float = setting(
        0.0, "of the chosen completion's mean negative log-likelihood, added to any loss (Llama 3: 0.2)"
    )
    skip_eos: bool = setting(
        False, "leave the end-of-turn token out of the comparison (Llama 3's masking of termination tokens)"
    )
    reference: str = setting(
        "cached",
        "where its log-probabilities come from: kept on disk, a second copy, the model without its adapter",
        choices=("cached", "memory", "adapter", "none"),
    )
    reference_model: str = setting(
        "", 'the MODEL that is cached or in memory; "" = the policy that training starts from'
    )
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(self, "dpo")
        if self.reference == "none" and self.loss not in REFERENCE_FREE:
            raise InputError(
                f"dpo.loss={self.loss} compares with a reference, but dpo.reference is none; use cached, or one of the "
                f"losses that need none: {', '.join(REFERENCE_FREE)}."
            )
        if self.reference_model and (self.reference == "none" or self.loss in REFERENCE_FREE):
            raise InputError(
                f"dpo.reference_model is {shown(self.reference_model)}, but dpo.loss={self.loss} with "
                f"dpo.reference={self.reference} compares with no reference; leave it empty."
            )
        values = vars(self)
        for name, users in USED_BY.items():
            if self.loss in NEEDED_BY.get(name, ()) and not values[name]:
                raise InputError(
                    f"dpo.loss={self.loss} needs dpo.{name}, which is 0; set it (--describe says what it is)."
                )
            if self.loss not in users and values[name] != DEFAULTS[name]:
                listed = ", ".join(users) if len(users) < 9 else "all but slic and orpo"
                raise InputError(
                    f"dpo.{name} is {values[name]:g}, and dpo.loss={self.loss} does not look at it; these do: {listed}."
                )


DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}


def gather_pairs(logps_BN2: Array, batch: PreferenceBatch, reference_BN: Array, options: Options) -> Pairs:
    """Gathers the comparisons' completions."""

    def gather(values_BN: Array, indices_BP: Array) -> Array:
        return jnp.take_along_axis(values_BN, indices_BP, axis=1)

    def two(values_BN: Array) -> tuple[Array, Array]:
        return gather(values_BN, batch.better), gather(values_BN, batch.worse)

    sums_BN = logps_BN2[..., 0]
    lengths_BN = batch.lengths.astype(jnp.float32)
    skipped_BN = _skipped(batch, options)
    compared_BN = _compared(logps_BN2, skipped_BN)
    compared_lengths_BN = jnp.maximum(lengths_BN - skipped_BN, 1)
    chosen, rejected = two(compared_BN)
    reference_chosen, reference_rejected = two(reference_BN)
    chosen_lengths, rejected_lengths = two(compared_lengths_BN)
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_lengths=jnp.maximum(chosen_lengths, 1),
        rejected_lengths=jnp.maximum(rejected_lengths, 1),
        margins=batch.margins,
        weights=decided_weights(batch),
        chosen_nll=-gather(sums_BN, batch.better),
        nll_lengths=jnp.maximum(gather(lengths_BN, batch.better), 1),
    )


def pair_losses(
    params: PyTree,
    batch: PreferenceBatch,
    reference_BN: Array,
    *,
    model: Model,
    options: Options,
    share_prompt: bool,
    is_first_step: Array | bool = False,
) -> tuple[Array, Metrics]:
    """Sum of the losses over the comparisons of rows `[B, ...]` (differentiable), and metrics.

    A difference between policy and reference that float32's rounding explains counts as none, so that untrained pairs
    are tied. In the first step of training this holds for the rounding of the compute dtype: the cached reference was
    computed in other rows, and what bfloat16 gives depends on the place in a row.
    """
    logps_BN2 = policy_logps(params, batch, model=model, share_prompt=share_prompt)
    compared_BN = jax.lax.stop_gradient(_compared(logps_BN2, _skipped(batch, options)))
    own_eps, float32_eps = (float(jnp.finfo(dtype).eps) for dtype in (model.module.dtype, jnp.float32))
    eps = jnp.where(is_first_step, own_eps, float32_eps)
    is_rounding_BN = jnp.abs(compared_BN - reference_BN) <= _rounding(compared_BN, batch.lengths, eps)
    reference_BN = jnp.where(is_rounding_BN, compared_BN, reference_BN)
    pairs = gather_pairs(logps_BN2, batch, reference_BN, options)
    output = LOSSES[options.loss](pairs, options)
    total = jnp.sum(output.loss)
    metrics = jax.lax.stop_gradient(output.metrics)
    if options.loss not in REFERENCE_FREE:
        change_BP = jax.lax.stop_gradient(pairs.chosen - pairs.reference_chosen)
        metrics["logps/chosen_change"] = Metric(jnp.sum(pairs.weights * change_BP), output.count)
    if options.nll_weight:
        nll_BP = pairs.weights * pairs.chosen_nll / pairs.nll_lengths
        total = total + options.nll_weight * jnp.sum(nll_BP)
        metrics["nll_chosen"] = Metric(jax.lax.stop_gradient(jnp.sum(nll_BP)), output.count)
    metrics |= {
        "loss": Metric(jax.lax.stop_gradient(total), output.count),
        "pairs": Metric(jnp.sum(pairs.weights != 0, dtype=jnp.float32), jnp.float32(1)),
        **padding_metrics(batch.segment_ids),
    }
    return total, metrics


# (whole parameters, reference parameters, micro-batch) -> log-probabilities `[B, N]`
Reference = Callable[[PyTree, PyTree, PreferenceBatch], Array]


def train_step(
    state: TrainState,
    batch: PreferenceBatch,
    reference_params: PyTree,
    *,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    ema_decay: float,
    options: Options,
    reference: Reference,
    share_prompt: bool,
) -> tuple[TrainState, Metrics]:
    """One step on a global batch `[M, B, ...]`."""

    def loss_sum(params: PyTree, micro: PreferenceBatch) -> tuple[Array, Metrics]:
        whole = combine(params, state.frozen)
        reference_BN = jax.lax.stop_gradient(reference(whole, reference_params, micro))
        return pair_losses(
            whole,
            micro,
            reference_BN,
            model=model,
            options=options,
            share_prompt=share_prompt,
            is_first_step=state.step == 0,
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


def eval_step(
    params: PyTree,
    batch: PreferenceBatch,
    reference_params: PyTree,
    *,
    model: Model,
    options: Options,
    reference: Reference,
    share_prompt: bool,
) -> Metrics:
    """Held-out metrics on rows `[M, B, ...]`, per comparison."""

    def micro_metrics(micro: PreferenceBatch) -> Metrics:
        reference_BN = reference(params, reference_params, micro)
        return pair_losses(
            params, micro, reference_BN, model=model, options=options, share_prompt=share_prompt
        )[1]

    metrics = eval_sums(micro_metrics, batch)
    accuracy = metrics.pop("rewards/accuracies")
    counted = {name: metric for name, metric in metrics.items() if name not in TOTALS | {"padding_share"}}
    named = {f"eval/{name}": metric for name, metric in counted.items()}
    return {**named, "eval/reward_accuracy": accuracy}


def steps(options: Options, setup: PreferenceSetup) -> Steps[PreferenceBatch]:
    """The functions above, bound to a model and its reference."""
    model, data = setup.spec.model, setup.data
    if options.skip_eos:
        options = dataclasses.replace(options, end_ids=end_token_ids(setup.spec.tokenizer))

    def compared(sources: Sequence[PreferenceSource], logps: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The cached log-probabilities `[S]` of each source; none where they are computed in every step."""
        pairs = zip(sources, logps, strict=True) if logps else ()
        return [_compared(known, _skipped_of_store(source, options)) for source, known in pairs]

    def computed(whole: PyTree, reference_params: PyTree, rows: PreferenceBatch) -> Array:
        """The reference's log-probabilities `[B, N]`: those that the rows carry, or by a second forward pass."""
        if reference.logps is None:
            return rows.reference_logps
        return _compared(reference.logps(whole, reference_params, rows), _skipped(rows, options))

    reference = setup.reference
    bind = functools.partial(
        functools.partial,
        model=model,
        options=options,
        reference=computed,
        share_prompt=data.shape.share_prompt,
    )
    return Steps(
        make_state=functools.partial(init_state, model=model),
        train_step=bind(train_step),
        eval_step=bind(eval_step),
        train=data.train_rows(compared(data.train.sources, reference.train), reference.identity),
        held_out=data.held_out_rows(compared(data.held_out_sources, reference.held_out), reference.identity),
        batch=PreferenceBatch,
        row_tokens=data.shape.length,
        constants=(reference.params,),
        after_eval=_warn_of_displacement,
        progress=PROGRESS,
        panels=PANELS,
    )


def check_pairs(options: Options, data: Preferences) -> None:
    """Raises InputError for data that the loss cannot learn from."""
    sources = data.train.sources
    if options.loss == "rpo" and not any(source.arrays.margin.any() for source in sources):
        raise InputError("dpo.loss=rpo needs the data's margins, and data.train holds none.")
    if any((source.arrays.probability < 1).any() for source in sources):
        log_on_host0("data.train holds soft labels, taken for hard ones; those of 1/2 are left out.")
    for source in (*sources, *data.held_out_sources):
        if not source.report.comparisons:
            raise InputError(
                f"{source.report.source} holds no comparison of two completions (one completion a prompt, or ties), "
                "and DPO needs them; labels are for algorithm=kto, ratings for algorithm=reward_model."
            )


Values = TypeVar("Values", Array, np.ndarray)


def _compared(logps: Values, skipped: Values) -> Values:
    """Of `[..., 2]` (all trained tokens, the last one): what is compared, without the last one where it is skipped."""
    return logps[..., 0] - skipped * logps[..., 1]


def _rounding(logps_BN: Array, lengths_BN: Array, eps: Array) -> Array:
    """How far apart rounding alone may leave two log-probabilities of a completion of n tokens, nats: 32 eps sqrt(n) of
    the dtype (SmolLM2-135M in bfloat16, at other places in a row: up to 10), and the rounding of the float32 sum."""
    eps_of_sums = float(jnp.finfo(jnp.float32).eps)
    lengths_BN = jnp.maximum(lengths_BN.astype(jnp.float32), 1.0)
    return 32.0 * eps * jnp.sqrt(lengths_BN) + 4.0 * eps_of_sums * jnp.abs(logps_BN)


def _skipped(batch: PreferenceBatch, options: Options) -> Array:
    """1 where a completion's last token is left out of the comparison, else 0, float32 `[B, N]`."""
    if not options.skip_eos:
        return jnp.zeros(batch.last_token_index.shape, jnp.float32)
    last_BN = jnp.take_along_axis(batch.tokens, batch.last_token_index, axis=1)
    return jnp.isin(last_BN, jnp.asarray(options.end_ids, jnp.int32)).astype(jnp.float32)


def _skipped_of_store(source: PreferenceSource, options: Options) -> np.ndarray:
    """The same of all sequences of a source's store, float32 `[S]`."""
    store = source.store
    last_S = np.asarray(store.tokens)[store.offsets[1:] - 1]
    return np.isin(last_S, options.end_ids).astype(np.float32) * np.float32(options.skip_eos)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The last tokens of completions that are whole: of a text EOS, of a turn what the chat template ends it with."""
    ids = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        try:
            shape = ChatTemplate(tokenizer).shape
        except InputError:  # then no row is a chat
            return tuple(sorted(ids))
        ids |= {shape.end.token_ids[-1], shape.tool_end.token_ids[-1]}
    return tuple(sorted(ids))


def _warn_of_displacement(values: dict[str, float]) -> dict[str, float]:
    """Says when the chosen completions became less likely than they were; the values as they are."""
    fallen = values.get("eval/logps/chosen_change", 0.0)
    if fallen < -1.0:
        log_on_host0(
            f"The held-out chosen completions are {-fallen:.1f} nats less likely than under the reference: DPO "
            "can lower both sides (likelihood displacement, arXiv:2410.08847); dpo.nll_weight or dpo.loss=dpop "
            "hold them up."
        )
    return values


ALGORITHM = PreferenceAlgorithm(
    section="dpo",
    options=Options,
    steps=steps,
    check_data=check_pairs,
    reference=lambda options: "none" if options.loss in REFERENCE_FREE else options.reference,
    reference_model=lambda options: options.reference_model,
)
