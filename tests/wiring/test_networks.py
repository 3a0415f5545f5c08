"""Networks beside the policy."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from configs.ppo.letters import get_config
from posttrain_jax.algorithms import dpo
from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import make_mesh
from posttrain_jax.forward.reference import ReferencePolicy
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.export import export_hf
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import make_model
from posttrain_jax.wiring.algorithms import read_experiment
from posttrain_jax.wiring.model import model_spec
from posttrain_jax.wiring.networks import reference_policy
from posttrain_jax.wiring.preference_reference import make_reference

CONFIG = ModelConfig("llama", 260, 16, 1, 2, 1, 8, 32, query_scale=8**-0.5, max_length=64)


def saved(folder: Path, *, is_reward: bool = False, more_tokens: bool = False) -> str:
    """A random model, smaller than the policy."""
    params = dict(make_model(CONFIG).init(jax.random.key(5)))
    if is_reward:
        params.pop("head", None)
        params["score_head"] = score_head_params(jax.random.key(6), CONFIG.d_model, init="normal")
    tokenizer = byte_tokenizer()
    if more_tokens:
        tokenizer.add_tokens(["<more>"])
    export_hf(folder, config=CONFIG, params=params, tokenizer=tokenizer)
    return str(folder)


def reference(kind: str, **changes) -> ReferencePolicy | None:
    config = get_config("tiny")
    for name, value in changes.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    experiment = read_experiment(config.to_dict())
    spec = model_spec(experiment)
    return reference_policy("rollout.reference", kind, experiment, spec, make_mesh(), jax.random.key(0))


def test_a_reference_may_be_another_model(tmp_path):
    policy = reference(saved(tmp_path / "model"))
    assert policy is not None and policy.model.config.d_model == CONFIG.d_model
    made = make_model(CONFIG).init(jax.random.key(5))
    np.testing.assert_array_equal(policy.params["embed"]["embedding"], made["embed"]["embedding"])


def test_without_a_reference_nothing_is_loaded():
    assert reference("none") is None
    assert reference("ema", optim__ema=0.9).params == {}


def test_references_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="is a reward model, which gives tokens no probability"):
        reference(saved(tmp_path / "reward", is_reward=True))
    with pytest.raises(InputError, match=r"The reference .* has another tokenizer \(.*261 tokens"):
        reference(saved(tmp_path / "tokens", more_tokens=True))
    with pytest.raises(InputError, match="was made for 64 tokens, and rows have up to 80"):
        reference(saved(tmp_path / "short"), data__max_length=80)
    with pytest.raises(
        InputError, match="rollout.reference is 'nowhere': use one of none, frozen, adapter, ema"
    ):
        reference("nowhere")


@pytest.mark.parametrize("kind", ["none", "frozen", "adapter", "ema"])
def test_a_kind_is_no_model(kind):
    with pytest.raises(InputError, match=f"dpo.reference_model is {kind}, which is no MODEL"):
        make_reference("cached", kind, "dpo", None, None, None, make_mesh(), Path())  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"loss": "simpo", "beta": 2.0}, {"loss": "simpo", "reference": "none"}])
def test_a_reference_that_nothing_is_compared_with_is_refused(changes):
    with pytest.raises(InputError, match="dpo.reference_model is 'a/model', but dpo.loss=simpo"):
        dpo.Options(reference_model="a/model", **changes)


def test_an_adapter_is_no_other_model():
    with pytest.raises(InputError, match="dpo.reference_model is a/model; use cached or memory"):
        make_reference("adapter", "a/model", "dpo", None, None, None, make_mesh(), Path())  # type: ignore[arg-type]
