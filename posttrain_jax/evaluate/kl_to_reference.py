"""How far a policy has moved from its reference: KL(policy || reference) on completions that the policy writes now.

Completions are drawn at temperature 1 without filters or penalties, for only then are they draws from the policy, and
both models score them by the training forward pass. `losses.kl` says what k1 and k3 are; both are unbiased here, summed
over a completion or divided by tokens. k1 is the plain one, k3 varies less and is never negative; where they disagree
by more than their standard errors, the completions are too few to trust either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict as Config
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import PyTree
from posttrain_jax.data.sources import Row
from posttrain_jax.evaluate.own_data import held_out_by, held_out_prompts, run_config
from posttrain_jax.evaluate.tasks import (
    Progress,
    PromptTemplate,
    TaskResult,
    chat_options,
    check_first,
    print_data,
    read_items,
    summarize,
    task_rows,
)
from posttrain_jax.losses.kl import k1, k3
from posttrain_jax.models.io.load import LoadedModel, load_model, require_language_model
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate
from posttrain_jax.sampling.prompts import encode_user_prompt, is_chat, need_tokenizer
from posttrain_jax.sampling.score import score_samples

DEMO = "asset:alpaca_en_demo"
"""Asked where neither `data.eval` nor a run says anything."""


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over prompts and its standard error; None where there is one prompt only."""

    value: float
    standard_error: float | None


@dataclasses.dataclass(frozen=True)
class KlToReference:
    """KL(policy || reference) in nats, on `samples` completions of `prompts` prompts.

    Attributes:
      k1_per_sequence, k3_per_sequence: of whole completions: the sum over a completion's tokens, mean over completions.
      k1_per_token, k3_per_token: the same sums divided by the number of tokens of all completions.
      tokens_per_sequence: mean length of a completion, its stop token included.
      samples, prompts: how many there were.
    """

    k1_per_sequence: Mean
    k3_per_sequence: Mean
    k1_per_token: Mean
    k3_per_token: Mean
    tokens_per_sequence: Mean
    samples: int
    prompts: int


def kl_to_reference(
    model: Model,
    params: PyTree,
    reference_model: Model,
    reference_params: PyTree,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    seed: int,
    num_samples: int = 1,
    stop_token_ids: tuple[int, ...] = (),
    batch_size: int = 8,
) -> KlToReference:
    """Samples completions from the policy and estimates its KL from the reference.

    The KL is that of completions cut off after `max_new_tokens`.

    Args:
      model, params: the policy.
      reference_model, reference_params: the reference, with the same vocabulary.
      prompts: token ids, each a non-empty 1-D array. Standard errors are over prompts; samples of one go together.
      max_new_tokens, num_samples, stop_token_ids, seed, batch_size: see `GenerateOptions`.

    Raises:
      InputError: there are no prompts, the vocabularies differ, a bad option, or log-probabilities that are not finite.
    """
    if not prompts:
        raise InputError("There are no prompts, so there is nothing to estimate the KL from.")
    if max_new_tokens < 1:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}; an empty completion has no KL, so give 1 or more."
        )
    sizes = model.config.vocab_size, reference_model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"The policy's vocabulary has {sizes[0]} tokens and the reference's {sizes[1]}; the KL is of models with "
            "the same tokens."
        )
    options = GenerateOptions(
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        sampling=Sampling(temperature=1.0),
        num_samples=num_samples,
        seed=seed,
        batch_size=batch_size,
    )
    samples = generate(model, params, prompts, options)
    policy_logps = score_samples(model, params, prompts, samples, batch_rows=batch_size)
    reference_logps = score_samples(
        reference_model, reference_params, prompts, samples, batch_rows=batch_size
    )
    return estimate(samples, policy_logps, reference_logps)


def estimate(
    samples: Sequence[Sample], policy_logps: Sequence[np.ndarray], reference_logps: Sequence[np.ndarray]
) -> KlToReference:
    """The estimates from completions that were drawn and scored already (as a run has them).

    Args:
      samples: drawn from the policy at temperature 1, without filters.
      policy_logps, reference_logps: float32 `[n]` for each sample, nats, under each model at temperature 1.

    Raises:
      InputError: there are no samples, or a log-probability is not finite.
    """
    if not samples:
        raise InputError("There are no samples, so there is nothing to estimate the KL from.")
    policy_N = np.concatenate(list(policy_logps))
    reference_N = np.concatenate(list(reference_logps))
    if not (np.isfinite(policy_N).all() and np.isfinite(reference_N).all()):
        raise InputError(
            "A log-probability of the policy or the reference is not finite; their weights or dtype cannot be right."
        )
    numbers = {prompt: row for row, prompt in enumerate(dict.fromkeys(sample.prompt for sample in samples))}
    prompt_S = np.asarray([numbers[sample.prompt] for sample in samples])
    tokens_S = np.asarray([len(sample.tokens) for sample in samples])
    prompt_N = np.repeat(prompt_S, tokens_S)

    def by_prompt(values_N: np.ndarray) -> np.ndarray:
        return np.bincount(prompt_N, weights=values_N, minlength=len(numbers))

    sum_k1 = by_prompt(np.asarray(k1(jnp.asarray(policy_N), jnp.asarray(reference_N)), np.float64))
    sum_k3 = by_prompt(np.asarray(k3(jnp.asarray(policy_N), jnp.asarray(reference_N)), np.float64))
    tokens = by_prompt(np.ones(len(prompt_N)))
    count = np.bincount(prompt_S).astype(np.float64)
    return KlToReference(
        k1_per_sequence=ratio(sum_k1, count),
        k3_per_sequence=ratio(sum_k3, count),
        k1_per_token=ratio(sum_k1, tokens),
        k3_per_token=ratio(sum_k3, tokens),
        tokens_per_sequence=ratio(tokens, count),
        samples=len(samples),
        prompts=len(numbers),
    )


def ratio(sums_N: np.ndarray, counts_N: np.ndarray) -> Mean:
    """sum of sums / sum of counts over N independent rows, with the standard error of a ratio of means.

    se = sqrt(N / (N - 1) * sum_i (s_i - value * c_i)^2) / sum_i c_i (Cochran, Sampling Techniques, 1977, section 6.5);
    with equal counts that is the standard error of a mean.
    """
    rows, total = len(sums_N), counts_N.sum()
    value = sums_N.sum() / total
    if rows < 2:
        return Mean(float(value), None)
    squares = np.square(sums_N - value * counts_N).sum()
    return Mean(float(value), math.sqrt(rows / (rows - 1) * squares) / float(total))


@dataclasses.dataclass(frozen=True)
class _Prompt:
    key: str | int
    where: str
    text: str


def from_config(config: Config, loaded: LoadedModel, *, mesh: Mesh, progress: Progress) -> TaskResult:
    """`launch.evaluate` with eval.task "kl": the estimates with bootstrap intervals over prompts, and every completion.

    Raises:
      InputError: the reference cannot be loaded or has another vocabulary, or a row cannot be used.
    """
    tokenizer = need_tokenizer(loaded)
    reference_name = _reference_of(config, loaded)
    items, prompts, skipped, source = _prompts_of(config, loaded)
    data = print_data(len(items), source, first=config.data.first, skipped=skipped)
    if jax.process_index() == 0:
        print(f"reference: {reference_name}", flush=True)
    reference = load_model(
        reference_name, dtype=config.model.dtype, mesh=mesh, attention=config.model.attention
    )
    require_language_model(reference)
    if reference.config.vocab_size != loaded.config.vocab_size:
        raise InputError(
            f"{loaded.source.name} has {loaded.config.vocab_size} tokens and {reference_name} has "
            f"{reference.config.vocab_size}; the KL is of models with the same tokens."
        )
    options = GenerateOptions(
        max_new_tokens=config.eval.max_new_tokens,
        stop_token_ids=stop_token_ids(loaded.config, tokenizer),
        sampling=Sampling(temperature=1.0),
        num_samples=config.eval.num_samples,
        seed=config.seed,
        batch_size=config.eval.batch_rows,
    )
    samples = generate(loaded.model, loaded.params, prompts, options)
    scored = [
        score_samples(one.model, one.params, prompts, samples, batch_rows=config.eval.batch_rows)
        for one in (loaded, reference)
    ]
    progress(len(samples), len(samples))
    rows = [
        _row(
            item,
            [n for n, sample in enumerate(samples) if sample.prompt == place],
            samples,
            scored[0],
            scored[1],
            tokenizer,
        )
        for place, item in enumerate(items)
    ]
    counts = {"samples": len(samples), "skipped_rows": skipped}
    result = summarize(rows, counts=counts, by_type={}, bootstrap=config.eval.bootstrap, seed=config.seed)
    return dataclasses.replace(result, data=f"{data}; reference: {reference_name}")


def _reference_of(config: Config, loaded: LoadedModel) -> str:
    """`reference.model`, or the MODEL that the run in a workdir started from.

    Raises:
      InputError: neither says one.
    """
    if config.reference.model:
        return str(config.reference.model)
    run = run_config(loaded)
    if run is None or run["model"]["init"] in ("", "random"):
        why = "no run's workdir" if run is None else "of a run that started from random parameters"
        raise InputError(
            f"reference.model is empty, and {loaded.source.name} is {why}; give the MODEL that it is compared with."
        )
    return str(run["model"]["init"])


def _prompts_of(config: Config, loaded: LoadedModel) -> tuple[list[_Prompt], list[np.ndarray], int, str]:
    """What is asked: the prompts, their tokens, how many rows were left out, and where they come from.

    Raises:
      InputError: the rows cannot be used, or neither `data.eval` nor a run says any.
    """
    check_first(config.data.first)
    run = run_config(loaded)
    if not config.data.eval and run is not None:
        source = held_out_by(run, loaded.source.name)
        own = held_out_prompts(run, loaded, source)
        own = own[: config.data.first or None]
        own_prompts = [_Prompt(one.key, one.key, one.text) for one in own]
        return own_prompts, [one.tokens for one in own], 0, f"the prompts of {source.text()}"
    template = PromptTemplate(config.data.prompt)

    def convert(row: Row, key: str | int) -> _Prompt:
        return _Prompt(key, f"{row.source}, line {row.line}", template.fill(row.value))

    name = config.data.eval or DEMO
    items = read_items(task_rows(name), convert, first=config.data.first, on_bad_row=config.data.on_bad_row)
    chat = is_chat(loaded, config.data.render)
    rendering = chat_options(config)
    prompts = [
        encode_user_prompt(loaded, item.text, chat=chat, name=item.where, options=rendering)
        for item in items.items
    ]
    return items.items, prompts, items.skipped, name


def _row(
    item: _Prompt,
    numbers: Sequence[int],
    samples: Sequence[Sample],
    policy_logps: Sequence[np.ndarray],
    reference_logps: Sequence[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """One prompt's completions and sums; a prompt is what is drawn again by the bootstrap."""
    policy_N = np.concatenate([policy_logps[n] for n in numbers])
    reference_N = np.concatenate([reference_logps[n] for n in numbers])
    if not (np.isfinite(policy_N).all() and np.isfinite(reference_N).all()):
        raise InputError(
            f"{item.where}: a log-probability of its completion is not finite; the weights cannot be right."
        )
    sum_k1 = float(np.sum(np.asarray(k1(jnp.asarray(policy_N), jnp.asarray(reference_N)), np.float64)))
    sum_k3 = float(np.sum(np.asarray(k3(jnp.asarray(policy_N), jnp.asarray(reference_N)), np.float64)))
    count, tokens = float(len(numbers)), float(len(policy_N))
    return {
        "id": item.key,
        "prompt": item.text,
        "answers": [tokenizer.decode(samples[n].tokens, skip_special_tokens=True) for n in numbers],
        "metrics": {
            "kl_k1_per_sequence": (sum_k1, count),
            "kl_k3_per_sequence": (sum_k3, count),
            "kl_k1_per_token": (sum_k1, tokens),
            "kl_k3_per_token": (sum_k3, tokens),
            "tokens_per_sequence": (tokens, count),
        },
    }
