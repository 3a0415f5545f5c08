"""A model's completions of a list of prompts, for the tasks that check what was written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict as Config

from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.shown_row import empty_warning, shown_row
from posttrain_jax.evaluate.tasks import Progress, chat_options
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.thoughts import answer_text, prompt_opens_thought
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, generate_as_finished
from posttrain_jax.sampling.prompts import encode_user_prompt, is_chat, need_tokenizer


@dataclasses.dataclass(frozen=True)
class CompletionOptions:
    """How completions are drawn.

    Attributes:
      max_new_tokens: most tokens of a completion.
      temperature: 0 = always the likeliest token.
      seed: of the random numbers.
      batch_rows: completions decoded side by side.
      render: "chat", "text", or "auto" (chat where the tokenizer has a template).
      stop: a completion ends before the first of these texts (base models go on with the next question).
      chat: how a chat is rendered.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    batch_rows: int = 8
    render: str = "auto"
    stop: tuple[str, ...] = ()
    chat: ChatOptions = DEFAULT_CHAT


def completion_options(config: Config) -> CompletionOptions:
    """What a task's config says about completions."""
    return CompletionOptions(
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature,
        seed=config.seed,
        batch_rows=config.eval.batch_rows,
        render=config.data.render,
        stop=tuple(config.eval.stop),
        chat=chat_options(config),
    )


def complete_all(
    loaded: LoadedModel,
    prompts: Sequence[str],
    names: Sequence[str],
    options: CompletionOptions,
    *,
    progress: Progress | None = None,
) -> list[Completion]:
    """One completion per prompt, in order. With several processes every one calls this alike and gets all of them.

    Args:
      loaded: the model.
      prompts: what a user would write.
      names: what to call each prompt in an error.
      options: how completions are drawn.
      progress: called as completions end.

    Raises:
      InputError: a bad option, or a prompt that leaves no room in the model's context; names it.
    """
    chat = is_chat(loaded, options.render)
    prompt_ids = [
        encode_user_prompt(loaded, text, chat=chat, name=name, options=options.chat)
        for text, name in zip(prompts, names, strict=True)
    ]
    generate_options = GenerateOptions(
        max_new_tokens=options.max_new_tokens,
        stop_token_ids=loaded.stop_token_ids,
        stop_strings=options.stop,
        sampling=Sampling(temperature=options.temperature),
        seed=options.seed,
        batch_size=options.batch_rows,
    )
    tokenizer = need_tokenizer(loaded)
    if prompt_ids:
        print(f"first prompt ({names[0]}): {shown_row(tokenizer, prompt_ids[0])}", file=sys.stderr)
    samples = generate_as_finished(
        loaded.model, loaded.params, prompt_ids, generate_options, tokenizer=tokenizer, names=names
    )
    completions: dict[int, Completion] = {}
    for sample in samples:
        ids = prompt_ids[sample.prompt].tolist()
        completions[sample.prompt] = Completion(
            prompt=prompts[sample.prompt],
            prompt_ids=tuple(ids),
            text=answer_text(tokenizer, sample.tokens, stop_at=sample.stop_at),
            token_ids=tuple(int(token) for token in sample.tokens),
            finish_reason=sample.finish_reason,
            row={},
            in_thought=prompt_opens_thought(tokenizer, ids),
        )
        if progress is not None:
            progress(len(completions), len(prompt_ids))
    warning = empty_warning(
        sum(not completion.text.strip() for completion in completions.values()), len(completions)
    )
    if warning:
        print(f"\n{warning}", file=sys.stderr)
    return [completions[index] for index in range(len(prompt_ids))]
