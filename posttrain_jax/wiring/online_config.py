"""What algorithms that sample read from a config: prompts, drawing, scoring, the value network, and sizes."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.core.sharding import jit_step, tree_shardings
from posttrain_jax.core.trees import combine, partition
from posttrain_jax.core.types import PyTree, TrainState
from posttrain_jax.data.columns import unused_text
from posttrain_jax.data.prompt_rows import is_plain_text, other_columns
from posttrain_jax.data.prompts import Prompt, PromptData, read_prompts
from posttrain_jax.data.shown_row import plain_text_warning, shown_row
from posttrain_jax.data.split import hold_out, split_amount
from posttrain_jax.models.config import LoraConfig, ModelConfig
from posttrain_jax.models.io.load import load_model, require_score_head
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.models.reward_head import score_head_params
from posttrain_jax.models.transformer import Model, make_model
from posttrain_jax.rewards.workers import PythonReward
from posttrain_jax.rollouts.draw import RolloutOptions, encode_prompt
from posttrain_jax.rollouts.experience import policy_params
from posttrain_jax.rollouts.score import ScoreOptions, Scorer, check_tokenizer, load_reward_model
from posttrain_jax.wiring.data import chat_from_config, column_names, data_spec, say_trained_rows
from posttrain_jax.wiring.experiment import ModelSpec

VALUES = ("none", "policy", "shared")
REFERENCES = ("frozen", "adapter", "ema")


@dataclasses.dataclass(frozen=True)
class Cut:
    """How an iteration's rows are cut: `micro_batches` of all of them, each of `micro_rows`."""

    rows: int
    micro_rows: int
    micro_batches: int


def cut_from_config(config: Config, mesh: Mesh, *, minibatches: int) -> Cut:
    """The sizes that config and mesh give.

    Raises:
      InputError: they do not divide; says which numbers would.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.train.rows_per_step * config.rollout.samples
    if rows <= 0 or rows % (minibatches * shards):
        raise InputError(
            f"train.rows_per_step={config.train.rows_per_step} prompts x rollout.samples={config.rollout.samples} = "
            f"{rows} answers do not divide into {minibatches} minibatches on {shards} devices that split rows; make "
            f"the product a multiple of {minibatches * shards}."
        )
    part = rows // minibatches
    micro = config.train.micro_rows or part
    if micro <= 0 or part % micro or micro % shards:
        fitting = [n for n in range(shards, part + 1, shards) if part % n == 0]
        raise InputError(
            f"train.micro_rows={micro} must divide a minibatch's {part} answers and be a multiple of mesh.data x "
            f"mesh.fsdp = {shards}: it could be {', '.join(map(str, fitting))}."
        )
    return Cut(rows=rows, micro_rows=micro, micro_batches=rows // micro)


class ValueNetwork:
    """The value network beside a policy; see `Online.value` for what `kind` may be.

    Args:
      kind: "none", "policy", "shared", or a MODEL with a score head.
      config: the experiment.
      policy: beside which it stands.
      mesh: where its parameters go.

    Raises:
      InputError: no such MODEL, one without a score head, or with another tokenizer than the policy's.
    """

    def __init__(self, kind: str, config: Config, policy: ModelSpec, mesh: Mesh) -> None:
        self._kind = kind
        self._mesh = mesh
        self._load: Callable[[], PyTree] = dict
        self._shapes: PyTree = {}
        self.model: Model | None = None
        if kind == "shared":
            self.model = policy.model
        elif kind == "policy":
            policy.require_new_adapter("ppo.value=policy")
            self.model = without_adapter(config, policy)
        elif kind not in VALUES:
            load = functools.partial(
                load_model, kind, dtype=config.model.dtype, mesh=mesh, attention=config.model.attention
            )
            loaded = load()
            require_score_head(loaded)
            check_tokenizer(loaded, policy.tokenizer)
            check_context("ppo.value", kind, loaded.config, config.data.max_length)
            # The parameters are read again by `join`, so that they do not lie beside the state for the whole run.
            self._load = lambda: load().params
            self._shapes = jax.eval_shape(lambda: loaded.params)
            self.model = _definition(config, loaded.config, loaded.lora)

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
        own = partition(own, lambda path: path.endswith(("lora_a", "lora_b")))[1]
        return {**params, "value": {**own, "score_head": head}}


def check_context(key: str, name: str, model: ModelConfig, length: int) -> None:
    """Refuses rows that are longer than a model was made for: positions beyond mean nothing to it.

    Args:
      key: of the config, where the model is named.
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


def without_adapter(config: Config, policy: ModelSpec) -> Model:
    """The policy's definition for parameters without LoRA leaves."""
    return _definition(config, policy.model.config, LoraConfig())


def _definition(config: Config, model_config: ModelConfig, lora: LoraConfig) -> Model:
    return make_model(
        model_config,
        dtype=config.model.dtype,
        attention=config.model.attention,
        remat=config.train.remat,
        lora=lora,
    )


def reference_model(config: Config, policy: ModelSpec) -> Model:
    """The definition that the reference's parameters belong to.

    Raises:
      InputError: an unknown kind, an adapter to leave out where there is none, an average that is not kept.
    """
    kind = config.rollout.reference
    if kind not in REFERENCES:
        raise InputError(f"rollout.reference is {kind!r}; use one of {', '.join(REFERENCES)}.")
    if kind == "adapter":
        if not policy.model.lora.rank:
            raise InputError("rollout.reference=adapter leaves a LoRA adapter out, but model.lora.rank is 0.")
        policy.require_new_adapter("rollout.reference=adapter")
        return without_adapter(config, policy)
    if kind == "ema" and not config.optim.ema:
        raise InputError(
            "rollout.reference=ema is the moving average of the weights, but optim.ema is 0 (off)."
        )
    return policy.model


def reference_params(kind: str, start: PyTree) -> Callable[[TrainState], PyTree]:
    """A state -> the reference's parameters: the start's, the state's average, or {} = the policy's own without its
    adapter.

    Args:
      kind: one of REFERENCES.
      start: the policy's first parameters, for "frozen".
    """
    if kind == "adapter":
        return lambda state: {}
    if kind == "ema":
        return lambda state: policy_params(combine(state.ema, state.frozen))
    return lambda state: start


def rollout_options(config: Config, policy: ModelSpec) -> RolloutOptions:
    """How answers are drawn.

    Raises:
      InputError: a number out of its range.
    """
    rollout = config.rollout
    if rollout.max_new_tokens < 1 or rollout.max_new_tokens >= config.data.max_length:
        raise InputError(
            f"rollout.max_new_tokens is {rollout.max_new_tokens}; it must be at least 1 and leave room for a prompt in "
            f"data.max_length={config.data.max_length}."
        )
    if config.data.max_length > policy.model.config.max_length:
        raise InputError(
            f"data.max_length is {config.data.max_length}, and the model was made for {policy.model.config.max_length} "
            "tokens; lower it."
        )
    if not rollout.temperature > 0:
        raise InputError(
            f"rollout.temperature is {rollout.temperature}; it must be more than 0, for answers are drawn."
        )
    return RolloutOptions(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        samples=rollout.samples,
        batch_size=rollout.batch_size or config.train.rows_per_step * rollout.samples,
        stop_token_ids=stop_token_ids(policy.model.config, policy.tokenizer),
        truncate_token=None if rollout.truncate_token < 0 else rollout.truncate_token,
        truncate_after=rollout.truncate_after,
    )


def prompts_from_config(config: Config, policy: ModelSpec, workdir: Path) -> tuple[PromptData, list[Prompt]]:
    """Prompts to learn on, and held-out ones; rows that are skipped go into `workdir`'s rejected.jsonl.

    Raises:
      InputError: bad rows, a missing file, prompts that are too long.
    """

    chat = chat_from_config(config, policy.tokenizer, workdir)

    def read(spec: Any, rejected: str) -> PromptData:
        return read_prompts(
            data_spec(spec),
            functools.partial(
                encode_prompt,
                tokenizer=policy.tokenizer,
                vocab_size=policy.model.config.vocab_size,
                text_tokens=config.data.prompt_tokens,
                chat=chat,
            ),
            max_tokens=config.data.max_length - config.rollout.max_new_tokens,
            long_prompts=config.data.long_prompts,
            on_bad_row=config.data.on_bad_row,
            columns=column_names(config.data),
            rejected_path=workdir / rejected if jax.process_index() == 0 else None,
        )

    train = read(config.data.train, "rejected.jsonl")
    log_on_host0(train.text())
    first = train.sources[0].prompts[0]
    log_on_host0(f"first prompt ({first.row_id}): {shown_row(policy.tokenizer, first.tokens)}")
    others = collections.Counter(
        name for prompt in train.all() for name in other_columns(prompt.row, text_as=chat.text_as)
    )
    if others:
        log_on_host0(f"columns that are no part of the prompt and go to the reward: {unused_text(others)}")
    plain = sum(is_plain_text(prompt.row, chat.text_as) for prompt in train.all())
    if plain and policy.tokenizer.chat_template:
        log_on_host0(plain_text_warning(plain, len(train), "data.text_as=chat"))
    if not config.data.eval:
        return train, []
    amount = split_amount(data_spec(config.data.eval))
    if amount is not None:
        train, held_out = hold_out(train, amount, seed=config.seed)
    else:
        held_out = read(config.data.eval, "rejected-eval.jsonl")
        log_on_host0(held_out.text())
        say_trained_rows(train, held_out)
    log_on_host0(f"{len(train):,} prompts to learn on, {len(held_out):,} held out.")
    return train, held_out.all()


def scorer_from_config(config: Config, policy: ModelSpec, mesh: Mesh, cut: Cut) -> Scorer:
    """What `config.score` names.

    Raises:
      InputError: a function or model that is not there, weights that do not belong to them.
    """
    score = config.score
    names = [*score.functions, *score.models]
    weights = list(score.weights) or [1.0] * len(names)
    if len(weights) != len(names):
        raise InputError(
            f"score.weights has {len(weights)} numbers for {len(names)} rewards (score.functions, then score.models)."
        )
    if len(set(names)) != len(names):
        raise InputError("score.functions and score.models name a reward twice.")
    if score.aggregate == "piecewise" and score.weights:
        raise InputError(
            "score.weights is set, but score.aggregate=piecewise chooses one of two rewards and adds none."
        )
    options = ScoreOptions(
        weights=dict(zip(names, map(float, weights), strict=True)),
        aggregate=score.aggregate,
        safety_threshold=score.safety_threshold,
        free_tokens=score.free_tokens,
        per_token=score.per_token,
        clip=score.clip,
        missing_eos=score.missing_eos,
        missing_eos_value=score.missing_eos_value,
    )
    unknown = sorted(set(_arguments(config)) - {*score.functions, score.gold_function})
    if unknown:
        raise InputError(
            f"score.arguments names {unknown[0]}, which is neither among score.functions nor score.gold_function."
        )
    return _scorer(config, policy, mesh, cut, list(score.functions), list(score.models), options)


def _arguments(config: Config) -> dict[str, dict[str, Any]]:
    """`score.arguments`: the keyword arguments of reward functions, by their names.

    Raises:
      InputError: it is no JSON of that form.
    """
    text = config.score.arguments
    try:
        arguments = json.loads(text or "{}")
        if not all(isinstance(given, dict) for given in arguments.values()):
            raise ValueError("a function's arguments are an object too")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f'score.arguments is {text!r} ({error}); write JSON, {{"module:function": {{"argument": value}}}}.'
        ) from error
    return arguments


def check_gold(config: Config) -> None:
    """Before anything is started.

    Raises:
      InputError: two gold scores are named, or one that has nothing to score.
    """
    function, model = config.score.gold_function, config.score.gold_model
    if function and model:
        raise InputError(
            "score.gold_function and score.gold_model are both set; the gold score is one of them."
        )
    if (function or model) and not config.data.eval:
        raise InputError("score.gold_function and score.gold_model score held-out answers; set data.eval.")
    if config.stop.gold_errors and not (function or model):
        raise InputError(
            "stop.gold_errors watches the gold score; set score.gold_function or score.gold_model."
        )
    if config.stop.gold_errors and not config.eval.every:
        raise InputError("stop.gold_errors watches evaluations, and eval.every is 0 (none); set eval.every.")


def gold_from_config(config: Config, policy: ModelSpec, mesh: Mesh, cut: Cut) -> Scorer | None:
    """What scores held-out answers and is never learnt from, if anything does (see `check_gold`).

    Raises:
      InputError: a function or model that is not there.
    """
    function, model = config.score.gold_function, config.score.gold_model
    if not function and not model:
        return None
    options = ScoreOptions(weights={function or model: 1.0})
    return _scorer(
        config, policy, mesh, cut, [function] if function else [], [model] if model else [], options
    )


def _scorer(
    config: Config,
    policy: ModelSpec,
    mesh: Mesh,
    cut: Cut,
    functions: list[str],
    models: list[str],
    options: ScoreOptions,
) -> Scorer:
    score, arguments = config.score, _arguments(config)
    loaded = {
        name: load_reward_model(
            name,
            combination=score.ensemble,
            coefficient=score.coefficient,
            mesh=mesh,
            dtype=config.model.dtype,
            attention=config.model.attention,
        )
        for name in models
    }
    for name, reward in loaded.items():
        check_context("score", name, reward.members[0].config, config.data.max_length)
    return Scorer(
        policy.tokenizer,
        functions={
            name: PythonReward(
                name,
                arguments=arguments.get(name, {}),
                seconds=score.seconds,
                completions_per_call=score.completions_per_call,
                failure_score=score.failure,
            )
            for name in functions
        },
        models=loaded,
        options=options,
        mesh=mesh,
        rows=cut.rows,
        micro_batches=cut.micro_batches,
        workers=score.workers,
    )
