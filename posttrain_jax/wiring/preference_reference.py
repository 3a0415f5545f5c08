"""Where the reference's log-probabilities of preferences come from.

The reference is the model that training starts from, or another MODEL. What bfloat16 gives for a completion depends on
its place in a row (SmolLM2-135M: by up to half a nat), so that after the first step a cached reference adds such noise
to the log-ratios of training, though not of evaluations; one in memory adds none.
"""

from __future__ import annotations

import functools
from pathlib import Path

from jax.sharding import Mesh

from posttrain_jax.algorithms.contract import Reference
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import fingerprint
from posttrain_jax.core.types import Array, PreferenceBatch, PyTree
from posttrain_jax.data.preference_rows import Preferences
from posttrain_jax.forward.completions import policy_logps
from posttrain_jax.forward.reference import KINDS, ReferencePolicy
from posttrain_jax.forward.reference_cache import reference_logps
from posttrain_jax.models.spec import ModelSpec
from posttrain_jax.wiring.data import eval_rows
from posttrain_jax.wiring.experiment import PreferenceExperiment
from posttrain_jax.wiring.networks import reference_policy
from posttrain_jax.wiring.task import micro_batches, seed_key


def make_reference(
    kind: str,
    model: str,
    section: str,
    experiment: PreferenceExperiment,
    spec: ModelSpec,
    data: Preferences,
    mesh: Mesh,
    workdir: Path,
) -> Reference:
    """The reference of a run.

    Args:
      kind: as in `PreferenceAlgorithm.reference`.
      model: a MODEL; "" = the policy that training starts from.
      section: the algorithm's own, for errors.
      experiment, spec, data, mesh, workdir: of the run.

    Raises:
      InputError: as `reference_policy`.
    """
    if kind == "none":
        return Reference()
    if kind == "adapter" and model:
        raise InputError(
            f"{section}.reference=adapter is the policy without its adapter, and {section}.reference_model is {model}; "
            'use cached or memory, or set the latter to "".'
        )
    if model in KINDS:
        raise InputError(
            f"{section}.reference_model is {model}, which is no MODEL; choose the kind by {section}.reference, and "
            f"write a folder of this name as ./{model}."
        )
    key = f"{section}.reference_model" if model else f"{section}.reference"
    what = model or ("adapter" if kind == "adapter" else "frozen")
    policy = reference_policy(key, what, experiment, spec, mesh, seed_key(experiment.seed))
    assert policy is not None
    if kind == "cached":
        return _cached(policy, experiment, data, mesh, workdir)
    share = data.shape.share_prompt

    def computed(whole: PyTree, reference_params: PyTree, rows: PreferenceBatch) -> Array:
        params = policy.parameters(whole, {}, reference_params)
        return policy_logps(params, rows, model=policy.model, share_prompt=share)

    identity = fingerprint(policy.params) if policy.params else ""
    return Reference(logps=computed, params=policy.params, identity=identity)


def _cached(
    policy: ReferencePolicy, experiment: PreferenceExperiment, data: Preferences, mesh: Mesh, workdir: Path
) -> Reference:
    logps_of = functools.partial(reference_logps, policy.model, policy.params, mesh=mesh, workdir=workdir)
    train = logps_of(
        data.train.sources,
        data.shape,
        groups=experiment.train.rows_per_step,
        micro_batches=micro_batches(experiment.train, mesh),
    )
    at_once, count = eval_rows(experiment.train, experiment.eval)
    held_out = logps_of(
        data.held_out.sources if data.held_out is not None else (),
        data.eval_shape,
        groups=at_once,
        micro_batches=count,
        in_order=True,
    )
    return Reference(train=train, held_out=held_out)
