"""Every algorithm by its name, the sections of its config, and the task that a config makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_jax.algorithms import dpo, kto, ppo, reward_model, rloo, sft
from posttrain_jax.algorithms.contract import OnlineAlgorithm, PreferenceAlgorithm, TextAlgorithm
from posttrain_jax.core.errors import InputError, shown
from posttrain_jax.core.schema import Sections, read_all
from posttrain_jax.core.types import Task
from posttrain_jax.data.options import PreferenceDataOptions, PromptDataOptions, TextDataOptions
from posttrain_jax.rewards.score_options import ScoreOptions
from posttrain_jax.rollouts.sampling import RolloutOptions
from posttrain_jax.run.options import OfflineEvalOptions, OnlineEvalOptions
from posttrain_jax.run.stop_rules import StopRules
from posttrain_jax.wiring.experiment import (
    SHARED,
    Experiment,
    OnlineExperiment,
    PreferenceExperiment,
    TextExperiment,
)
from posttrain_jax.wiring.key_names import SYNONYMS
from posttrain_jax.wiring.offline import preference_task, text_task
from posttrain_jax.wiring.online import online_task

Algorithm = TextAlgorithm | PreferenceAlgorithm | OnlineAlgorithm

ALGORITHMS: dict[str, Algorithm] = {
    "sft": sft.ALGORITHM,
    "dpo": dpo.ALGORITHM,
    "kto": kto.ALGORITHM,
    "reward_model": reward_model.ALGORITHM,
    "ppo": ppo.ALGORITHM,
    "rloo": rloo.ALGORITHM,
}


def algorithm_named(name: object) -> Algorithm:
    """The algorithm of a config.

    Raises:
      InputError: there is none of this name.
    """
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise InputError(f"algorithm is {shown(name)}; use one of {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[name]


def own_sections() -> set[str]:
    """The names of the algorithms' own sections: an earlier version's run wrote those of others too."""
    return {one.section for one in ALGORITHMS.values() if not isinstance(one, TextAlgorithm)}


def sections_of(name: object) -> Sections:
    """The sections of an algorithm's config, in the order in which they are shown.

    Raises:
      InputError: as `algorithm_named`.
    """
    algorithm = algorithm_named(name)
    if isinstance(algorithm, TextAlgorithm):
        return {**SHARED, "data": TextDataOptions, "eval": OfflineEvalOptions}
    if isinstance(algorithm, OnlineAlgorithm):
        return {
            **SHARED,
            "data": PromptDataOptions,
            "eval": OnlineEvalOptions,
            "rollout": RolloutOptions,
            "score": ScoreOptions,
            algorithm.section: algorithm.options,
            "stop": StopRules,
        }
    return {
        **SHARED,
        "data": PreferenceDataOptions,
        "eval": OfflineEvalOptions,
        algorithm.section: algorithm.options,
    }


def read_experiment(values: Mapping[str, Any]) -> Experiment:
    """The typed sections of a config's nested values.

    Raises:
      InputError: an unknown algorithm or key, a value of the wrong type or out of its range, values that do not fit
        each other; names the key.
    """
    name = values.get("algorithm", "sft")
    algorithm, sections = algorithm_named(name), sections_of(name)
    for section in values:
        if section in own_sections() and section not in sections:
            raise InputError(
                f"The config has the section {section!r}, which algorithm={name} does not read; start it from "
                f"configs.base.experiment_config({name!r})."
            )
    parts = read_all(sections, values, SYNONYMS)
    run = parts[""]
    shared = {name: part for name, part in parts.items() if name in SHARED and name}
    shared |= {"algorithm": run.algorithm, "seed": run.seed, "sections": parts}
    if isinstance(algorithm, TextAlgorithm):
        return TextExperiment(options=None, **shared)
    if isinstance(algorithm, PreferenceAlgorithm):
        return PreferenceExperiment(options=parts[algorithm.section], **shared)
    return OnlineExperiment(
        options=parts[algorithm.section],
        rollout=parts["rollout"],
        score=parts["score"],
        stop=parts["stop"],
        **shared,
    )


def make_task(experiment: Experiment, workdir: Path) -> Task:
    """Everything that the training loop needs.

    Raises:
      InputError: a bad row, a model that cannot be used, sizes that do not divide.
    """
    algorithm = ALGORITHMS[experiment.algorithm]
    if isinstance(algorithm, TextAlgorithm):
        assert isinstance(experiment, TextExperiment)
        return text_task(experiment, algorithm, workdir)
    if isinstance(algorithm, PreferenceAlgorithm):
        assert isinstance(experiment, PreferenceExperiment)
        return preference_task(experiment, algorithm, workdir)
    assert isinstance(experiment, OnlineExperiment)
    return online_task(experiment, algorithm, workdir)
