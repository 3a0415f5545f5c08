"""Completions of a list of prompts by the engine (`sampling/engine.py`): all together, or each as it is finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.core.types import PyTree
from posttrain_jax.models.transformer import Model
from posttrain_jax.sampling.choose import GREEDY, Sampling, StaticSamplingOptions
from posttrain_jax.sampling.engine import Engine
from posttrain_jax.sampling.prompts import special_tokens, split_stops
from posttrain_jax.sampling.requests import Decoder, Request, Update, check_prompt
from posttrain_jax.sampling.shapes import bucket, max_length_for

LONG_PROMPTS = ("error", "cut")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
      prompt: the index of its prompt in the list.
      sample: which of the prompt's `num_samples` it is.
      tokens: int32 `[n]`; the stop token that ended it is the last of them.
      logprobs: float32 `[n]`, nats: the model's own log-probability of each token given what stands before it;
        temperature, filters, penalties and bans do not enter.
      sample_logprobs: float32 `[n]`, nats: that under the distribution it was drawn from; 0 when greedy.
      finish_reason: "stop" (a stop token or string) or "length" (`max_new_tokens`, or the context is full).
      stop_string: the stop string that ended it, if one did.
      stop_at: the character of the text at which that stop string begins; the text ends before it.
      cut: how many tokens of the prompt were left out at its start (`long_prompts="cut"`).
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    sample_logprobs: np.ndarray
    finish_reason: str
    stop_string: str | None = None
    stop_at: int | None = None
    cut: int = 0

    def check_finite(self, name: str) -> None:
        """Raises InputError, with the prompt's name, if a log-probability is not finite."""
        if not np.isfinite(self.logprobs).all():
            raise InputError(
                f"{name}: the model's log-probabilities are not finite; its weights or its dtype cannot be right."
            )


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """How `generate` completes prompts.

    Attributes:
      max_new_tokens: most tokens of a completion, the stop token included; 0 gives empty completions. One number, or
        one for each prompt.
      min_new_tokens: stop tokens cannot be drawn before this many tokens.
      stop_token_ids: a completion ends with one of these (`models.io.tokenizer.stop_token_ids`).
      stop_strings: a completion ends where its text after the first `min_new_tokens` first holds one of these (needs
        the tokenizer). One that is a special token, which no text shows, ends it as that token.
      sampling: how tokens are drawn.
      num_samples: completions per prompt, which share one prefill of it.
      seed: of the random numbers; needed with a temperature, for two calls with one seed draw the same numbers.
      ignore_eos: stop tokens do not end a completion.
      batch_size: completions decoded side by side.
      max_prompt_tokens: most tokens of a prompt; 0 = what the model's context allows.
      long_prompts: "error", or "cut": the start of a prompt that is too long is left out, and `Sample.cut` counts
        its tokens.
    """

    max_new_tokens: int | Sequence[int]
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    num_samples: int = 1
    seed: int | None = None
    ignore_eos: bool = False
    batch_size: int = 8
    max_prompt_tokens: int = 0
    long_prompts: str = "error"

    def __post_init__(self) -> None:
        limits = [self.max_new_tokens] if isinstance(self.max_new_tokens, int) else self.max_new_tokens
        for limit in limits:
            if limit < 0:
                raise InputError(f"max_new_tokens is {limit}; it must be 0 or more.")
            if not 0 <= self.min_new_tokens <= limit:
                raise InputError(
                    f"min_new_tokens is {self.min_new_tokens}; it must lie between 0 and max_new_tokens ({limit})."
                )
        if self.num_samples < 1:
            raise InputError(f"num_samples is {self.num_samples}; it must be at least 1.")
        if self.seed is None and self.sampling.temperature > 0:
            raise InputError(
                "seed is needed with a temperature: calls with the same seed draw the same random numbers."
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.max_prompt_tokens < 0:
            raise InputError(f"max_prompt_tokens is {self.max_prompt_tokens}; it must be 0 (off) or more.")
        if self.long_prompts not in LONG_PROMPTS:
            raise InputError(f"long_prompts is {self.long_prompts!r}; use {' or '.join(LONG_PROMPTS)}.")
        if "" in self.stop_strings:
            raise InputError("stop_strings holds an empty string, which every text holds.")


def generate(
    model: Model,
    params: PyTree,
    prompts: Sequence[np.ndarray],
    options: GenerateOptions,
    *,
    tokenizer: Decoder | None = None,
    names: Sequence[str] = (),
    ids: Sequence[int] = (),
    engine: Engine | None = None,
) -> list[Sample]:
    """All completions, in order of prompt and sample; everything else as `generate_as_finished`."""
    samples = generate_as_finished(
        model, params, prompts, options, tokenizer=tokenizer, names=names, ids=ids, engine=engine
    )
    return sorted(samples, key=lambda sample: (sample.prompt, sample.sample))


def generate_as_finished(
    model: Model,
    params: PyTree,
    prompts: Sequence[np.ndarray],
    options: GenerateOptions,
    *,
    tokenizer: Decoder | None = None,
    names: Sequence[str] = (),
    ids: Sequence[int] = (),
    done: Collection[tuple[int, int]] = (),
    engine: Engine | None = None,
) -> Iterator[Sample]:
    """Every completion as soon as it is finished, in the order in which they finish.

    A token depends on `seed`, the prompt's id, the sample's number and the token's index in the completion alone:
    not on `batch_size`, the other prompts or what is `done`.

    Args:
      model, params: parameters as `load_model` or a train state holds them, sharded or not. With several
        processes every one makes the same call and gets all completions.
      prompts: token ids, each a non-empty 1-D array.
      options: see there.
      tokenizer: for stop strings.
      names: what to call each prompt in an error; default "prompt 0", "prompt 1" ...
      ids: each prompt's number below 2^31, which its random numbers depend on; default: its index in the list.
      done: (prompt, sample) pairs that are left out.
      engine: an engine of this model with these parameters and enough room; None = one is made for these prompts. A
        run that generates again and again keeps one engine, for every other size is compiled again.

    Raises:
      InputError: a bad option; an empty prompt, one that is too long, or a token id that is not in the
        vocabulary. All prompts are checked before the first one is read.
    """
    limits = options.max_new_tokens
    limits = [limits] * len(prompts) if isinstance(limits, int) else list(limits)
    ids = list(ids) if len(ids) else list(range(len(prompts)))
    for option, values in (("max_new_tokens", limits), ("ids", ids)):
        if len(values) != len(prompts):
            raise InputError(f"{option} has {len(values)} entries for {len(prompts)} prompts.")
    if options.stop_strings and tokenizer is None:
        raise InputError("stop strings need the model's tokenizer, and there is none.")
    checked = []
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        name = names[index] if names else f"prompt {index}"
        tokens, cut = _shorten(np.asarray(prompt), model, limit, name, options)
        check_prompt(model, tokens, name, limit)
        checked.append(_CheckedPrompt(tokens.astype(np.int32), cut, limit, ids[index]))
    return _completions(model, params, checked, options, tokenizer, frozenset(done), engine)


@dataclasses.dataclass(frozen=True)
class _CheckedPrompt:
    """A prompt as the engine reads it, without the `cut` tokens at its start."""

    tokens: np.ndarray
    cut: int
    max_new_tokens: int
    id: int


def _shorten(
    prompt: np.ndarray, model: Model, limit: int, name: str, options: GenerateOptions
) -> tuple[np.ndarray, int]:
    """The prompt without what is too long, and how many tokens of its start that leaves out."""
    most = model.config.max_length - min(limit, model.config.max_length - 1)
    if options.max_prompt_tokens:
        most = (
            min(most, options.max_prompt_tokens)
            if options.long_prompts == "cut"
            else options.max_prompt_tokens
        )
    elif options.long_prompts == "error":
        return prompt, 0
    if prompt.ndim != 1 or prompt.size <= most:
        return prompt, 0
    if options.long_prompts == "error":
        raise InputError(
            f"{name} has {prompt.size} tokens, more than max_prompt_tokens ({most}); shorten it, or use "
            "long_prompts=cut."
        )
    if most < 2 <= prompt.size and not options.max_prompt_tokens:
        raise InputError(
            f"{name}: max_new_tokens={limit} leaves room for one token of it in the model's {model.config.max_length}; "
            "lower max_new_tokens."
        )
    return prompt[-most:], prompt.size - most


def _completions(
    model: Model,
    params: PyTree,
    prompts: list[_CheckedPrompt],
    options: GenerateOptions,
    tokenizer: Decoder | None,
    done: frozenset[tuple[int, int]],
    engine: Engine | None,
) -> Iterator[Sample]:
    special, strings = split_stops(options.stop_strings, special_tokens(tokenizer))
    stops = tuple(sorted({*special, *(() if options.ignore_eos else options.stop_token_ids)}))
    requests: dict[tuple[int, int], Request] = {}
    for index, prompt in enumerate(prompts):
        for number in range(options.num_samples):
            if (index, number) in done:
                continue
            if prompt.max_new_tokens == 0:
                nothing = np.zeros(0, np.float32)
                yield Sample(index, number, np.zeros(0, np.int32), nothing, nothing, "length", cut=prompt.cut)
                continue
            requests[index, number] = Request(
                tokens=prompt.tokens,
                max_new_tokens=prompt.max_new_tokens,
                min_new_tokens=options.min_new_tokens,
                stop_token_ids=stops,
                stop_strings=strings,
                sampling=options.sampling,
                seed=options.seed or 0,
                prompt=prompt.id,
                sample=number,
            )
    if not requests:
        return
    limit = max(prompt.max_new_tokens for prompt in prompts)
    engine = engine or Engine(
        model,
        params,
        slots=min(options.batch_size, len(prompts) * options.num_samples),
        max_length=max_length_for([prompt.tokens for prompt in prompts], limit),
        max_new_tokens=bucket(limit),
        static_options=StaticSamplingOptions.of(options.sampling, min_tokens=options.min_new_tokens),
        max_stop_tokens=len(stops),
        tokenizer=tokenizer,
    )
    samples = {engine.submit(request): sample for sample, request in requests.items()}
    parts: dict[int, list[Update]] = {}
    while engine.busy:
        for update in engine.step():
            parts.setdefault(update.request_id, []).append(update)
            if update.finish_reason is not None:
                index, number = samples[update.request_id]
                yield _joined(parts.pop(update.request_id), index, number, prompts[index].cut)


def _joined(parts: list[Update], prompt: int, sample: int, cut: int) -> Sample:
    last = parts[-1]
    assert last.finish_reason is not None
    return Sample(
        prompt=prompt,
        sample=sample,
        tokens=np.concatenate([part.tokens for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        sample_logprobs=np.concatenate([part.sample_logprobs for part in parts]),
        finish_reason=last.finish_reason,
        stop_string=last.stop_string,
        stop_at=last.stop_at,
        cut=cut,
    )
