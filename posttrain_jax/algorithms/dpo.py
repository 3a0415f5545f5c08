"""Direct preference optimization and its family: raise what people preferred above what they did not, without a
reward model and without sampling.

The step, from top to bottom: prompts with their completions, packed into rows -> hidden states, the prompt's once ->
log-probability of every completion -> the two of every comparison -> a loss of `losses/dpo.py` (or of its
reference-free siblings) -> gradient sums over the micro-batches that are not empty -> one division by the global
weight of the comparisons -> clip, optimizer, EMA, unless something is not finite.

The reference is the model that training starts from. By `dpo.reference` its log-probabilities are

    cached    computed before the first step and kept on disk (posttrain_jax/forward/reference_cache.py); the default
    memory    computed in every step by a second copy of the parameters
    adapter   computed in every step by the same parameters with the LoRA adapter left out
    none      not there, as for all losses that need no reference

What bfloat16 gives for a completion depends on its place in a row (SmolLM2-135M: by up to half a nat), so that after
the first step `cached` adds such noise to the log-ratios of training, though not of evaluations; `memory` adds none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.trees import combine, fingerprint, partition
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
from posttrain_jax.core.updates import apply_gradients, gradient_sums, map_micro_batches, used_micro_batches
from posttrain_jax.data.preference_groups import PreferenceData, PreferenceSource
from posttrain_jax.data.preference_rows import PreferenceRows, RowShape
from posttrain_jax.data.spans import ChatTemplate
from posttrain_jax.forward.completions import decided_weights, policy_logps
from posttrain_jax.forward.reference_cache import reference_logps
from posttrain_jax.losses import anchored
from posttrain_jax.losses import dpo as losses
from posttrain_jax.losses import reference_free as odds
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.wiring.data import Preferences, eval_rows, preferences_from_config
from posttrain_jax.wiring.experiment import (
    ModelSpec,
    Offline,
    init_state,
    mesh_from_config,
    micro_batches,
    model_spec_from_config,
    seed_key,
    task_from_config,
)

REFERENCES = ("cached", "memory", "adapter", "none")


@dataclasses.dataclass(frozen=True)
class Options:
    """The numbers of the losses; each uses those that its formula has.

    Attributes:
      loss: a name in LOSSES.
      beta: strength of the pull to the reference (or the scale of the reward).
      label_smoothing: cdpo, robust: how likely a label is wrong; exo: its epsilon.
      gamma: simpo's target margin, slic's delta.
      alpha: the weight of the formula's second term: rdpo's of the length difference, dpop's of its penalty, cpo's of
        the likelihood, orpo's and slic's lambda.
      eta: rpo's scale of the data's margins.
      nll_weight: of the chosen completion's mean negative log-likelihood, added to any loss (Llama 3: 0.2).
      skip_eos: leaves the end-of-turn token out of the comparison (Llama 3's masking of termination tokens).
      end_ids: the tokens that end a turn; a completion that was cut ends with another one, which stays.
    """

    loss: str
    beta: float
    label_smoothing: float
    gamma: float
    alpha: float
    eta: float
    nll_weight: float
    skip_eos: bool
    end_ids: tuple[int, ...] = ()


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


PairLoss = Callable[[Pairs, Options], LossOutput]

LOSSES: dict[str, PairLoss] = {
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
    "slic": lambda p, o: odds.slic_loss(
        p.chosen, p.rejected, p.chosen, delta=o.gamma, lambda_=o.alpha, weights_B=p.weights
    ),
    "simpo": lambda p, o: odds.simpo_loss(
        p.chosen, p.rejected, *p.lengths, beta=o.beta, gamma=o.gamma, weights_B=p.weights
    ),
    "orpo": lambda p, o: odds.orpo_loss(
        p.chosen, p.rejected, *p.lengths, lambda_=o.alpha, weights_B=p.weights
    ),
    "cpo": lambda p, o: odds.cpo_loss(
        p.chosen, p.rejected, p.chosen_lengths, beta=o.beta, alpha=o.alpha, weights_B=p.weights
    ),
}
SUMS = {"pairs", "tokens"}
REFERENCE_FREE = ("slic", "simpo", "orpo", "cpo")
USED_BY = {
    "label_smoothing": ("cdpo", "robust", "exo"),
    "alpha": ("rdpo", "dpop", "cpo", "orpo", "slic"),
    "gamma": ("simpo", "slic"),
    "eta": ("rpo",),
    "beta": tuple(loss for loss in LOSSES if loss not in ("slic", "orpo")),
}
"""The losses that look at a number of `Options`; the others refuse another value than the default."""
DEFAULTS = {
    "loss": "dpo",
    "beta": 0.1,
    "label_smoothing": 0.0,
    "gamma": 0.0,
    "alpha": 0.0,
    "eta": 1.0,
    "nll_weight": 0.0,
    "skip_eos": False,
    "reference": "cached",
}
"""Of `config.dpo`, as configs/base.py has them."""
NEEDED_BY = {
    "label_smoothing": ("cdpo", "robust", "exo"),
    "alpha": ("rdpo", "dpop", "cpo", "orpo"),
    "gamma": ("slic",),
    "eta": ("rpo",),
}
"""The losses that are not what they are called where it is 0."""


def pairs_of(logps_BN2: Array, batch: PreferenceBatch, reference_BN: Array, options: Options) -> Pairs:
    """Gathers the comparisons' completions."""

    def gather(values_BN: Array, places_BP: Array) -> Array:
        return jnp.take_along_axis(values_BN, places_BP, axis=1)

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

    In the first step the policy is the reference, and a difference between the two that rounding explains is none: the
    cached reference was computed in other rows, and what bfloat16 gives depends on the place in a row.
    """
    logps_BN2 = policy_logps(params, batch, model=model, share_prompt=share_prompt)
    compared_BN = jax.lax.stop_gradient(_compared(logps_BN2, _skipped(batch, options)))
    is_rounding_BN = jnp.abs(compared_BN - reference_BN) <= _rounding(compared_BN, batch.lengths, model)
    reference_BN = jnp.where(is_first_step & is_rounding_BN, compared_BN, reference_BN)
    pairs = pairs_of(logps_BN2, batch, reference_BN, options)
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
    real = jnp.sum(batch.segment_ids != 0, dtype=jnp.float32)
    metrics |= {
        "loss": Metric(jax.lax.stop_gradient(total), output.count),
        "pairs": Metric(jnp.sum(pairs.weights != 0, dtype=jnp.float32), jnp.float32(1)),
        "tokens": Metric(real, jnp.float32(1)),
        "padding_share": Metric(jnp.float32(batch.tokens.size) - real, jnp.float32(batch.tokens.size)),
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

    used = used_micro_batches(batch.segment_ids)
    gradients, metrics = gradient_sums(loss_sum, state.params, batch, used=used)
    loss = metrics["loss"]
    lr = schedule(state.step - state.skipped)  # the optimizer does not count skipped steps
    state, update_metrics = apply_gradients(
        state, gradients, loss.sum, optimizer=optimizer, count=loss.count, ema_decay=ema_decay
    )
    named = {
        f"train/{name}": Metric.of(metric.sum) if name in SUMS else metric for name, metric in metrics.items()
    }
    return state, {**named, **update_metrics, "train/lr": Metric.of(lr)}


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

    stacked = map_micro_batches(micro_metrics, batch, used_micro_batches(batch.segment_ids))
    metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)
    counted = {name: metric for name, metric in metrics.items() if name not in SUMS | {"padding_share"}}
    named = {f"eval/{name}": metric for name, metric in counted.items()}
    return {**named, "eval/reward_accuracy": metrics["rewards/accuracies"]}


def from_config(config: Config, workdir: Path) -> Task:
    """Everything the training loop needs, from an experiment's config.

    Raises:
      InputError: a bad value, a bad row, a model that cannot be used.
    """
    options = options_from_config(config)
    mesh = mesh_from_config(config)
    policy = model_spec_from_config(config)
    model = policy.model
    if options.skip_eos:
        options = dataclasses.replace(options, end_ids=end_token_ids(policy.tokenizer))
    data = preferences_from_config(config, policy.tokenizer, workdir, attention=model.module.implementation)
    _check_pairs(data, options)
    reference = _reference_from_config(config, workdir, policy, data, options, mesh)
    share = data.shape.share_prompt
    algorithm = Offline(
        make_state=functools.partial(init_state, model=model),
        train_step=functools.partial(
            train_step, model=model, options=options, reference=reference.logps, share_prompt=share
        ),
        eval_step=functools.partial(
            eval_step, model=model, options=options, reference=reference.logps, share_prompt=share
        ),
        train=reference.train,
        held_out=reference.held_out,
        batch=PreferenceBatch,
        row_tokens=data.shape.length,
        constants=(reference.params,),
        after_eval=_warn_of_displacement,
    )
    return task_from_config(config, workdir, policy, mesh, algorithm)


def options_from_config(config: Config) -> Options:
    """The loss and its numbers.

    Raises:
      InputError: an unknown loss or reference, a number out of its range, a loss without the reference it needs.
    """
    dpo = config.dpo
    if dpo.loss not in LOSSES:
        raise InputError(f"dpo.loss is {dpo.loss!r}; use one of {', '.join(LOSSES)}.")
    if dpo.reference not in REFERENCES:
        raise InputError(f"dpo.reference is {dpo.reference!r}; use one of {', '.join(REFERENCES)}.")
    if dpo.reference == "none" and dpo.loss not in REFERENCE_FREE:
        raise InputError(
            f"dpo.loss={dpo.loss} compares with a reference, but dpo.reference is none; use cached, or one of the "
            f"losses that need none: {', '.join(REFERENCE_FREE)}."
        )
    if not dpo.beta > 0:
        raise InputError(f"dpo.beta is {dpo.beta}; it must be more than 0.")
    if not 0 <= dpo.label_smoothing < 0.5:
        raise InputError(f"dpo.label_smoothing is {dpo.label_smoothing}; it must be from 0 to below 0.5.")
    for name, losses_of_it in USED_BY.items():
        if dpo.loss in NEEDED_BY.get(name, ()) and not dpo[name]:
            raise InputError(
                f"dpo.loss={dpo.loss} needs dpo.{name} (configs/base.py says what it is), which is 0; set it."
            )
        if dpo.loss not in losses_of_it and dpo[name] != DEFAULTS[name]:
            raise InputError(
                f"dpo.{name} is {dpo[name]}, and dpo.loss={dpo.loss} does not look at it; these do: "
                f"{', '.join(losses_of_it)}."
            )
    return Options(
        loss=dpo.loss,
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        gamma=dpo.gamma,
        alpha=dpo.alpha,
        eta=dpo.eta,
        nll_weight=dpo.nll_weight,
        skip_eos=dpo.skip_eos,
    )


def _check_pairs(data: Preferences, options: Options) -> None:
    sources = data.train.sources
    if options.loss == "rpo" and not any(source.arrays.margin.any() for source in sources):
        raise InputError("dpo.loss=rpo needs the data's margins, and data.train holds none.")
    if any((source.arrays.probability < 1).any() for source in sources):
        log_on_host0(
            "data.train holds soft labels, which are taken for hard ones; those of 1/2 are left out."
        )
    for part in (data.train, data.held_out):
        for source in part.sources if part is not None else ():
            if not source.report.comparisons:
                raise InputError(
                    f"{source.report.source} holds no comparison of two completions (one completion a prompt, or "
                    "ties), and DPO needs them; labels are for algorithm=kto, ratings for algorithm=reward_model."
                )


@dataclasses.dataclass(frozen=True)
class _ReferenceSource:
    """Where the reference's log-probabilities come from, and the rows that may carry them.

    Attributes:
      logps: how a micro-batch's are had.
      params: of a reference in memory, else {}.
      train, held_out: rows.
    """

    logps: Reference
    params: PyTree
    train: list[PreferenceRows]
    held_out: list[PreferenceRows]


def _reference_from_config(
    config: Config, workdir: Path, policy: ModelSpec, data: Preferences, options: Options, mesh: Mesh
) -> _ReferenceSource:
    kind = "none" if options.loss in REFERENCE_FREE else config.dpo.reference
    key = seed_key(config.seed)

    def rows(
        part: PreferenceData | None,
        shape: RowShape,
        known: Sequence[np.ndarray] | None,
        reference: str = "",
    ) -> list[PreferenceRows]:
        if part is None:
            return []
        logps: list[np.ndarray | None] = [None] * len(part.sources)
        if known is not None:
            logps = [
                _compared(k, _skipped_of_store(s, options)) for s, k in zip(part.sources, known, strict=True)
            ]
        return [PreferenceRows(s, shape, one, reference) for s, one in zip(part.sources, logps, strict=True)]

    if kind == "cached":
        params = policy.init_params(mesh, key)
        of = functools.partial(reference_logps, policy.model, params, mesh=mesh, workdir=workdir)
        train = of(
            data.train.sources,
            data.shape,
            groups=config.train.rows_per_step,
            micro_batches=micro_batches(config, mesh),
        )
        at_once, count = eval_rows(config)
        held_out = of(
            data.held_out.sources if data.held_out is not None else (),
            data.eval_shape,
            groups=at_once,
            micro_batches=count,
            in_order=True,
        )
        return _ReferenceSource(
            logps=_stored,
            params={},
            train=rows(data.train, data.shape, train),
            held_out=rows(data.held_out, data.eval_shape, held_out),
        )
    params = policy.init_params(mesh, key) if kind == "memory" else {}
    identity = fingerprint(params) if kind == "memory" else ""
    train_rows = rows(data.train, data.shape, None, identity)
    held_out_rows = rows(data.held_out, data.eval_shape, None, identity)
    if kind == "none":
        return _ReferenceSource(_stored, {}, train_rows, held_out_rows)
    if kind == "adapter":
        if not policy.model.lora.rank:
            raise InputError("dpo.reference=adapter leaves a LoRA adapter out, but model.lora.rank is 0.")
        policy.require_new_adapter("dpo.reference=adapter")
        base = make_model(
            policy.model.config,
            dtype=config.model.dtype,
            attention=config.model.attention,
            remat=config.train.remat,
        )
    else:
        base = policy.model
    share = data.shape.share_prompt

    def computed(whole: PyTree, reference_params: PyTree, micro: PreferenceBatch) -> Array:
        without_adapter = partition(whole, lambda path: path.endswith(("lora_a", "lora_b")))[1]
        weights = without_adapter if kind == "adapter" else reference_params
        logps_BN2 = policy_logps(weights, micro, model=base, share_prompt=share)
        return _compared(logps_BN2, _skipped(micro, options))

    return _ReferenceSource(computed, params, train_rows, held_out_rows)


def _stored(whole: PyTree, reference_params: PyTree, micro: PreferenceBatch) -> Array:
    """What the rows carry."""
    return micro.reference_logps


Values = TypeVar("Values", Array, np.ndarray)


def _compared(logps: Values, skipped: Values) -> Values:
    """Of `[..., 2]` (all trained tokens, the last one): what is compared, without the last one where it is skipped."""
    return logps[..., 0] - skipped * logps[..., 1]


def _rounding(logps_BN: Array, lengths_BN: Array, model: Model) -> Array:
    """How far apart rounding alone may leave two log-probabilities of a completion of n tokens, nats: 32 eps sqrt(n) of
    the compute dtype (SmolLM2-135M in bfloat16, at other places in a row: up to 10), and the rounding of the sum."""
    eps, eps_of_sums = (float(jnp.finfo(dtype).eps) for dtype in (model.module.dtype, jnp.float32))
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
