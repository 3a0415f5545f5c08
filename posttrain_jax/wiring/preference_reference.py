"""Where the reference's log-probabilities of preferences come from.

The reference is the model that training starts from. What bfloat16 gives for a completion depends on its place in a row
(SmolLM2-135M: by up to half a nat), so that after the first step a cached reference adds such noise to the log-ratios
of training, though not of evaluations; one in memory adds none.
"""

from __future__ import annotations

import functools
from pathlib import Path

from jax.sharding import Mesh

from posttrain_jax.algorithms.contract import Reference
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.trees import fingerprint, partition
from posttrain_jax.core.types import Array, PreferenceBatch, PyTree
from posttrain_jax.data.preference_rows import Preferences
from posttrain_jax.forward.completions import policy_logps
from posttrain_jax.forward.reference_cache import reference_logps
from posttrain_jax.models.config import LoraConfig
from posttrain_jax.models.spec import ModelSpec, is_adapter
from posttrain_jax.run.options import OfflineEvalOptions
from posttrain_jax.wiring.data import eval_rows
from posttrain_jax.wiring.experiment import Experiment
from posttrain_jax.wiring.model import define_model
from posttrain_jax.wiring.task import micro_batches, seed_key


def make_reference(
    kind: str,
    section: str,
    experiment: Experiment,
    spec: ModelSpec,
    data: Preferences,
    mesh: Mesh,
    workdir: Path,
) -> Reference:
    """The reference of a run.

    Args:
      kind: as in `PreferenceAlgorithm.reference`.
      section: the algorithm's own, for errors.
      experiment, spec, data, mesh, workdir: of the run.

    Raises:
      InputError: an adapter to leave out where there is none, or one that was trained before.
    """
    share = data.shape.share_prompt
    if kind == "none":
        return Reference()
    if kind == "cached":
        return _cached(experiment, spec, data, mesh, workdir)
    if kind == "memory":
        params = spec.init_params(mesh, seed_key(experiment.seed))
        model = spec.model

        def in_memory(whole: PyTree, reference_params: PyTree, rows: PreferenceBatch) -> Array:
            return policy_logps(reference_params, rows, model=model, share_prompt=share)

        return Reference(logps=in_memory, params=params, identity=fingerprint(params))
    if not spec.model.lora.rank:
        raise InputError(f"{section}.reference=adapter leaves a LoRA adapter out, but model.lora.rank is 0.")
    spec.require_new_adapter(f"{section}.reference=adapter")
    base = define_model(experiment, spec.model.config, LoraConfig())

    def without_adapter(whole: PyTree, reference_params: PyTree, rows: PreferenceBatch) -> Array:
        return policy_logps(partition(whole, is_adapter)[1], rows, model=base, share_prompt=share)

    return Reference(logps=without_adapter)


def _cached(
    experiment: Experiment, spec: ModelSpec, data: Preferences, mesh: Mesh, workdir: Path
) -> Reference:
    assert isinstance(experiment.eval, OfflineEvalOptions)
    params = spec.init_params(mesh, seed_key(experiment.seed))
    logps_of = functools.partial(reference_logps, spec.model, params, mesh=mesh, workdir=workdir)
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
