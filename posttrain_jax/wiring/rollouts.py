"""What algorithms that sample read from a config: prompts, sampling, scoring, and the sizes of a batch."""

from __future__ import annotations

import collections
import dataclasses
import functools
from pathlib import Path

import jax
from jax.sharding import Mesh

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.log import log_on_host0
from posttrain_jax.data.options import Source
from posttrain_jax.data.prompt_rows import is_plain_text, other_columns
from posttrain_jax.data.prompts import Prompt, PromptData, read_prompts
from posttrain_jax.data.rows import unused_text
from posttrain_jax.data.shown_row import plain_text_warning, shown_row
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.models.spec import ModelSpec
from posttrain_jax.rewards.score_options import ScoreOptions
from posttrain_jax.rewards.scorer import Scorer, load_reward_model
from posttrain_jax.rewards.workers import PythonReward
from posttrain_jax.rollouts.sampling import RolloutOptions, encode_prompt
from posttrain_jax.rollouts.trajectory import BatchShape
from posttrain_jax.wiring.data import chat_options, column_names, data_spec, train_and_held_out
from posttrain_jax.wiring.experiment import OnlineExperiment
from posttrain_jax.wiring.networks import check_context

# A packed row has room for so many completions of the greatest length, and at most so many tokens (a longer completion
# has a row of its own). Longer rows leave a little less padding, but attention goes over whole blocks of 128 tokens
# (XLA's over the whole row): with rows of 1024 a tiny model was three times slower on completions of 30 tokens.
MAX_JOINED = 4
MAX_ROW_LENGTH = 1024


def batch_shape(
    experiment: OnlineExperiment, mesh: Mesh, *, epochs: int, minibatches: int, length: int
) -> BatchShape:
    """The static sizes of an iteration's batch, from config and mesh.

    A micro-batch has the tokens of `train.micro_rows` completions of the greatest length. Its rows are made longer and
    fewer where they can be (MAX_JOINED, MAX_ROW_LENGTH), which leaves less padding: a row of T = k S tokens is not
    begun before k trajectories of at most S tokens lie in the one before.

    Args:
      experiment: its sizes and sections.
      mesh: of the devices.
      epochs, minibatches: of the algorithm.
      length: S, most tokens of a trajectory.

    Raises:
      InputError: the sizes do not divide; says which numbers would.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    completions = experiment.train.rows_per_step * experiment.rollout.samples
    if completions <= 0 or completions % (minibatches * shards):
        raise InputError(
            f"train.rows_per_step={experiment.train.rows_per_step} prompts x "
            f"rollout.samples={experiment.rollout.samples} = {completions} completions do not divide into "
            f"{minibatches} minibatches on {shards} devices that split rows; make the product a multiple of "
            f"{minibatches * shards}."
        )
    part = completions // minibatches
    micro = experiment.train.micro_rows or part
    if micro <= 0 or part % micro or micro % shards:
        fitting = [n for n in range(shards, part + 1, shards) if part % n == 0]
        raise InputError(
            f"train.micro_rows={micro} must divide a minibatch's {part} completions and be a multiple of mesh.data x "
            f"mesh.fsdp = {shards}: it could be {', '.join(map(str, fitting))}."
        )
    per_device = micro // shards
    joined = max(
        n
        for n in range(1, MAX_JOINED + 1)
        if per_device % n == 0 and (n == 1 or n * length <= MAX_ROW_LENGTH)
    )
    # The kernels of packed rows work on blocks of 128 tokens.
    multiple = 128 if joined * length >= 512 else 8
    return BatchShape(
        trajectories=completions,
        length=length,
        epochs=epochs,
        minibatches=minibatches,
        micro_batches=part // micro,
        micro_rows=micro // joined,
        row_length=-(-joined * length // multiple) * multiple,
    )


def sampling_options(experiment: OnlineExperiment, policy: ModelSpec) -> RolloutOptions:
    """The section `rollout`, with the sizes and stop tokens that depend on other sections.

    Raises:
      InputError: a number out of its range.
    """
    options = experiment.rollout
    if options.max_new_tokens >= experiment.data.max_length:
        raise InputError(
            f"rollout.max_new_tokens is {options.max_new_tokens}; it must leave room for a prompt in data.max_length="
            f"{experiment.data.max_length}."
        )
    if experiment.data.max_length > policy.model.config.max_length:
        raise InputError(
            f"data.max_length is {experiment.data.max_length}, and the model was made for "
            f"{policy.model.config.max_length} tokens; lower it."
        )
    return dataclasses.replace(
        options,
        batch_size=options.batch_size or experiment.train.rows_per_step * options.samples,
        stop_token_ids=stop_token_ids(policy.model.config, policy.tokenizer),
    )


def prompts_from_config(
    experiment: OnlineExperiment, policy: ModelSpec, workdir: Path
) -> tuple[PromptData, list[Prompt]]:
    """Prompts to learn from, and held-out ones; rows that are skipped go into `workdir`'s rejected.jsonl.

    Raises:
      InputError: bad rows, a missing file, prompts that are too long.
    """

    chat = chat_options(experiment.data, policy.tokenizer, workdir)

    def read(source: Source, rejected: Path) -> PromptData:
        data = read_prompts(
            data_spec(source),
            functools.partial(
                encode_prompt,
                tokenizer=policy.tokenizer,
                vocab_size=policy.model.config.vocab_size,
                text_tokens=experiment.data.prompt_tokens,
                chat=chat,
            ),
            max_tokens=experiment.data.max_length - experiment.rollout.max_new_tokens,
            long_prompts=experiment.data.long_prompts,
            on_bad_row=experiment.data.on_bad_row,
            columns=column_names(experiment.data),
            rejected_path=rejected if jax.process_index() == 0 else None,
        )
        log_on_host0(data.text())
        return data

    train, held_out = train_and_held_out(experiment.data, read, workdir, seed=experiment.seed)
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
    if held_out is None:
        return train, []
    log_on_host0(f"{len(train):,} prompts to learn from, {len(held_out):,} held out.")
    return train, held_out.all()


def check_score(score: ScoreOptions, experiment: OnlineExperiment) -> None:
    """What a score needs of other sections, before anything is started.

    Raises:
      InputError: a gold score that has nothing to score, or that is watched and not there.
    """
    if score.gold is not None and not experiment.data.eval:
        raise InputError(
            "score.gold_function and score.gold_model score held-out completions; set data.eval."
        )
    if experiment.stop.gold_errors and score.gold is None:
        raise InputError(
            "stop.gold_errors watches the gold score; set score.gold_function or score.gold_model."
        )
    if experiment.stop.gold_errors and not experiment.eval.every:
        raise InputError("stop.gold_errors watches evaluations, and eval.every is 0 (none); set eval.every.")


def make_scorer(
    score: ScoreOptions, experiment: OnlineExperiment, policy: ModelSpec, mesh: Mesh, shape: BatchShape
) -> Scorer:
    """The reward functions and models of a section `score`, in worker processes and on the mesh.

    Raises:
      InputError: a function or model that is not there, or that does not fit the policy.
    """
    models = {
        name: load_reward_model(
            name, score, mesh=mesh, dtype=experiment.model.dtype, attention=experiment.model.attention
        )
        for name in score.models
    }
    for name, reward in models.items():
        check_context("score", name, reward.members[0].config, experiment.data.max_length)
    return Scorer(
        policy.tokenizer,
        functions={
            name: PythonReward(
                name,
                arguments=score.arguments.get(name, {}),
                seconds=score.seconds,
                completions_per_call=score.completions_per_call,
                failure_score=score.failure,
            )
            for name in score.functions
        },
        models=models,
        options=score,
        mesh=mesh,
        micro_rows=shape.micro_rows,
        row_length=shape.row_length,
    )
