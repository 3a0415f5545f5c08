"""Networks beside the policy: the reference of DPO and of reinforcement learning, and the value network of PPO."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.sharding import jit_step, tree_shardings
from posttrain_jax.core.trees import partition
from posttrain_jax.core.types import Array, PyTree
from posttrain_jax.forward.reference import KINDS, ReferencePolicy
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.load import is_reward_model, load_model, require_score_head, resolve
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.spec import ModelSpec, is_adapter
from posttrain_jax.models.transformer import Model
from posttrain_jax.rewards.scorer import check_tokenizer
from posttrain_jax.wiring.experiment import Experiment, OnlineExperiment
from posttrain_jax.wiring.model import define_model

VALUES = ("none", "policy", "shared")


def reference_policy(
    key: str, kind: str, experiment: Experiment, policy: ModelSpec, mesh: Mesh, random: Array
) -> ReferencePolicy | None:
    """What `key` names (forward/reference.py says what there is); nothing is loaded for "none".

    Args:
      key: of the experiment, for messages.
      kind: its value.
      experiment: its sizes and sections.
      policy: what is compared with it.
      mesh: where its parameters go.
      random: the key that the policy's new parameters are drawn with.

    Raises:
      InputError: an adapter to leave out where there is none, an average that is not kept, no such MODEL, or one with
        other tokens than the policy's.
    """
    if kind == "none":
        return None
    if kind == "frozen":
        return ReferencePolicy(kind, policy.model, policy.init_params(mesh, random))
    if kind == "adapter":
        if not policy.model.lora.rank:
            raise InputError(f"{key}=adapter leaves a LoRA adapter out, but model.lora.rank is 0.")
        policy.require_new_adapter(f"{key}=adapter")
        return ReferencePolicy(kind, without_adapter(experiment, policy), {})
    if kind == "ema":
        if not experiment.optim.ema:
            raise InputError(f"{key}=ema is the moving average of the weights, but optim.ema is 0 (off).")
        return ReferencePolicy(kind, policy.model, {})
    try:
        source = resolve(kind)
    except InputError as error:
        raise InputError(f"{key} is {kind!r}: use one of {', '.join(KINDS)}, or a MODEL ({error})") from None
    if is_reward_model(source):
        raise InputError(
            f"{key}={kind} is a reward model, which gives tokens no probability; use a language model."
        )
    loaded = load_model(kind, dtype=experiment.model.dtype, mesh=mesh, attention=experiment.model.attention)
    check_tokenizer(loaded, policy.tokenizer, what=f"The reference {kind}")
    check_context(key, kind, loaded.config, experiment.data.max_length)
    return ReferencePolicy(kind, define_model(experiment, loaded.config, loaded.lora), loaded.params)


class ValueNetwork:
    """The value network beside a policy; see `ppo.value` for what `kind` may be.

    Args:
      kind: "none", "policy", "shared", or a MODEL with a score head.
      experiment: its sizes and sections.
      policy: beside which it stands.
      mesh: where its parameters go.

    Raises:
      InputError: no such MODEL, one without a score head, or with another tokenizer than the policy's.
    """

    def __init__(self, kind: str, experiment: OnlineExperiment, policy: ModelSpec, mesh: Mesh) -> None:
        self._kind = kind
        self._mesh = mesh
        self._load: Callable[[], PyTree] = dict
        self._shapes: PyTree = {}
        self.model: Model | None = None
        if kind == "shared":
            self.model = policy.model
        elif kind == "policy":
            policy.require_new_adapter("ppo.value=policy")
            self.model = without_adapter(experiment, policy)
        elif kind not in VALUES:
            load = functools.partial(
                load_model,
                kind,
                dtype=experiment.model.dtype,
                mesh=mesh,
                attention=experiment.model.attention,
            )
            loaded = load()
            require_score_head(loaded)
            check_tokenizer(loaded, policy.tokenizer)
            check_context("ppo.value", kind, loaded.config, experiment.data.max_length)
            # The parameters are read again by `join`, so that they do not lie beside the state for the whole run.
            self._load = lambda: load().params
            self._shapes = jax.eval_shape(lambda: loaded.params)
            self.model = define_model(experiment, loaded.config, loaded.lora)

    def abstract(self, params: PyTree) -> PyTree:
        """Shapes of the policy's parameters with the value's."""
        return jax.eval_shape(self._with_value, params, self._shapes)

    def join(self, params: PyTree) -> PyTree:
        """The policy's parameters, and the value's under "value", in their places on the mesh."""
        places = tree_shardings(self.abstract(params), self._mesh)
        build = jit_step(self._with_value, self._mesh, in_shardings=None, out_shardings=places)
        return build(params, self._load())

    def _with_value(self, params: PyTree, loaded: PyTree) -> PyTree:
        if self.model is None:
            return params
        if loaded:
            # The gain becomes part of the kernel, so that the size of an update does not depend on it.
            head = loaded["score_head"]
            linear = {**head, "kernel": head["gain"] * head["kernel"], "gain": jnp.ones_like(head["gain"])}
            return {**params, "value": {**loaded, "score_head": linear}}
        head = score_head_params(jax.random.key(0), self.model.config.d_model, init="zeros")
        if self._kind == "shared":
            return {**params, "value": {"score_head": head}}
        own = {name: part for name, part in params.items() if name != "head"}
        own = partition(own, is_adapter)[1]
        return {**params, "value": {**own, "score_head": head}}


def check_context(key: str, name: str, model: ModelConfig, length: int) -> None:
    """Refuses rows that are longer than a model's context.

    Args:
      key: of the experiment, where the model is named.
      name: of the model.
      model: its numbers.
      length: tokens of a row.

    Raises:
      InputError: names both lengths.
    """
    if length > model.max_length:
        raise InputError(
            f"{key}: {name} was made for {model.max_length} tokens, and rows have up to {length}; lower "
            "data.max_length."
        )


def without_adapter(experiment: Experiment, policy: ModelSpec) -> Model:
    """The policy's definition for parameters without LoRA leaves."""
    return define_model(experiment, policy.model.config, LoraConfig())
