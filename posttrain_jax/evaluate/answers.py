"""Answers of a model to a list of questions, for the tasks that check what was written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict as Config
from transformers import PreTrainedTokenizerFast

from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.shown_row import empty_warning, shown_row
from posttrain_jax.evaluate.tasks import Progress, chat_options
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.models.io.tokenizer import stop_token_ids
from posttrain_jax.rewards.thoughts import after_thought, answer_text, prompt_opens_thought
from posttrain_jax.sampling.choose import Sampling
from posttrain_jax.sampling.generate import GenerateOptions, Sample, generate_as_finished
from posttrain_jax.sampling.prompts import encode_user_prompt, is_chat, need_tokenizer


@dataclasses.dataclass(frozen=True)
class Answering:
    """How answers are drawn.

    Attributes:
      max_new_tokens: most tokens of an answer.
      temperature: 0 = always the likeliest token.
      seed: of the random numbers.
      batch_rows: answers decoded side by side.
      render: "chat", "text", or "auto" (chat where the tokenizer has a template).
      stop: an answer ends before the first of these texts (base models go on with the next question).
      chat: how a chat is rendered.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    batch_rows: int = 8
    render: str = "auto"
    stop: tuple[str, ...] = ()
    chat: ChatOptions = DEFAULT_CHAT


def answering(config: Config) -> Answering:
    """What a task's config says about answers."""
    return Answering(
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature,
        seed=config.seed,
        batch_rows=config.eval.batch_rows,
        render=config.data.render,
        stop=tuple(config.eval.stop),
        chat=chat_options(config),
    )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
      text: without special tokens.
      tokens: how many were drawn.
      finish_reason: why it ended.
      in_thought: the prompt opened a thought, so the text starts inside it.
    """

    text: str
    tokens: int
    finish_reason: str
    in_thought: bool = False

    @property
    def without_thinking(self) -> str:
        """See the function of this name."""
        return without_thinking(self.text, in_thought=self.in_thought)


def answer_all(
    loaded: LoadedModel,
    questions: Sequence[str],
    names: Sequence[str],
    options: Answering,
    *,
    progress: Progress | None = None,
) -> list[Completion]:
    """One answer per question, in order. With several processes every one calls this alike and gets all answers.

    Args:
      loaded: the model.
      questions: what a user would write.
      names: what to call each question in an error.
      options: how answers are drawn.
      progress: called as answers end.

    Raises:
      InputError: a bad option, or a question that leaves no room in the model's context; names it.
    """
    chat = is_chat(loaded, options.render)
    prompts = [
        encode_user_prompt(loaded, text, chat=chat, name=name, options=options.chat)
        for text, name in zip(questions, names, strict=True)
    ]
    asked = GenerateOptions(
        max_new_tokens=options.max_new_tokens,
        stop_token_ids=stop_token_ids(loaded.config, loaded.tokenizer),
        stop_strings=options.stop,
        sampling=Sampling(temperature=options.temperature),
        seed=options.seed,
        batch_size=options.batch_rows,
    )
    tokenizer = need_tokenizer(loaded)
    if prompts:
        print(f"first prompt ({names[0]}): {shown_row(tokenizer, prompts[0])}", file=sys.stderr)
    samples = generate_as_finished(
        loaded.model, loaded.params, prompts, asked, tokenizer=tokenizer, names=names
    )
    answers: dict[int, Completion] = {}
    for sample in samples:
        in_thought = prompt_opens_thought(tokenizer, prompts[sample.prompt].tolist())
        answers[sample.prompt] = _answer(tokenizer, sample, in_thought=in_thought)
        if progress is not None:
            progress(len(answers), len(prompts))
    warning = empty_warning(sum(not answer.text.strip() for answer in answers.values()), len(answers))
    if warning:
        print(f"\n{warning}", file=sys.stderr)
    return [answers[place] for place in range(len(prompts))]


def _answer(tokenizer: PreTrainedTokenizerFast, sample: Sample, *, in_thought: bool) -> Completion:
    text = answer_text(tokenizer, sample.tokens, stop_at=sample.stop_at)
    return Completion(text, len(sample.tokens), sample.finish_reason, in_thought)


def without_thinking(text: str, *, in_thought: bool = False) -> str:
    """The part of an answer that is meant for the reader: what follows its thought; nothing of one that never ended.

    Args:
      text: of the answer.
      in_thought: the prompt opened the thought; a text cannot say so where it was cut off before `</think>`.
    """
    return after_thought(text, in_thought=in_thought) or ""
