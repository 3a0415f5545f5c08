"""Multiple choice by log-probability: which of the choices does a model find likeliest after the question?

As in lm-eval (arXiv:2405.14782): acc takes the choice with the largest summed log-probability, acc_norm divides it by
the choice's length in characters first, acc_bytes by its length in UTF-8 bytes. White space at the end of the question
is scored with the choice, as there: "Q: 2+2=" is gone on with "\\n4". Lengths are those of the choice alone.

Departures: lm-eval writes its `target_delimiter`, a space, also after white space, where here nothing stands between.
Where it slices the tokens of question and choice at the question's own number of tokens, a choice here starts at the
first token in which the texts of the question and of its choices differ, so where a tokenizer merges the end of the
question with the start of a choice, every choice is still scored as a continuation of the same tokens. And the white
space at the end of a chat template's header is the template's, not the choice's.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict as Config

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.chat_template import DEFAULT_CHAT, ChatOptions
from posttrain_jax.data.sources import Row, RowError
from posttrain_jax.evaluate.tasks import (
    Items,
    Progress,
    PromptTemplate,
    TaskResult,
    chat_options,
    column,
    print_data,
    read_items,
    summarize,
    task_rows,
)
from posttrain_jax.models.io.load import LoadedModel
from posttrain_jax.sampling.choices import choice_logps, encode_choices
from posttrain_jax.sampling.prompts import is_chat

COUNT_FROM = ("auto", "0", "1")
_LETTERED = re.compile(r"^([A-Z])[.)] ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      key: its id.
      where: file and line.
      prompt: what stands before a choice.
      choices: the texts to choose from, at least two.
      right: the place of the right one, from 0.
    """

    key: str | int
    where: str
    prompt: str
    choices: tuple[str, ...]
    right: int


def load_questions(
    source: str,
    *,
    prompt: str,
    choices: str,
    answer: str,
    count_from: str = "auto",
    first: int = 0,
    on_bad_row: str = "stop",
) -> Items[Question]:
    """The questions of a source.

    Args:
      source: "asset:NAME", or any source of `data.sources`. Optional column: id.
      prompt: template of what stands before a choice.
      choices: the column of the choices: a list of texts, {"text": [...], "label": [...]}, or one text with a choice
        on each line that starts with its letter ("A. bank").
      answer: the column of the right choice: its text, its label or letter, or its place.
      count_from: from what places are counted, "0" or "1"; "auto" = what the places of all rows say.
      first, on_bad_row: see `read_items`.

    Raises:
      InputError: there is no such source, the template is none, the places could be counted from 0 and from 1, or a row
        cannot be used; names file and line.
    """
    if count_from not in COUNT_FROM:
        raise InputError(f"data.count_from is {count_from!r}; use one of {', '.join(COUNT_FROM)}.")
    template = PromptTemplate(prompt)
    lowest: int | None = None if count_from == "auto" else int(count_from)

    def convert(row: Row, key: str | int) -> Question:
        nonlocal lowest
        texts, labels = _choices(column(row.value, choices), choices)
        right = _right(column(row.value, answer), texts, labels, answer)
        if isinstance(right, _Place):
            lowest = _counted_from(source, choices, answer) if lowest is None else lowest
            right = right.of(len(texts), lowest, answer)
        return Question(key, f"{row.source}:{row.line}", template.fill(row.value), tuple(texts), right)

    return read_items(task_rows(source), convert, first=first, on_bad_row=on_bad_row)


@dataclasses.dataclass(frozen=True)
class _Place:
    """A right choice that is named by its number."""

    number: int

    def of(self, count: int, lowest: int, name: str) -> int:
        """The place from 0 among `count` choices. Raises RowError where there is none."""
        if not lowest <= self.number < lowest + count:
            raise RowError(
                name,
                f"is {self.number}, which is no choice: no text, label or place (from {lowest}) of one",
            )
        return self.number - lowest


def _counted_from(source: str, choices: str, answer: str) -> int:
    """Whether the source counts places from 0 or from 1: 0 stands in it, or else as high a number as there are choices.

    Raises:
      InputError: neither does, so that every number could mean two choices.
    """
    from_one = False
    for row in task_rows(source):
        try:
            texts, labels = _choices(column(row.value, choices), choices)
            right = _right(column(row.value, answer), texts, labels, answer)
        except RowError:
            continue  # `read_items` says or counts it
        if isinstance(right, _Place):
            if right.number == 0:
                return 0
            from_one = from_one or right.number == len(texts)
    if not from_one:
        raise InputError(
            f"{source}: the numbers in the column {answer} could count the choices from 0 or from 1, for none is 0 "
            "and none is the number of its choices; set data.count_from to 0 or 1."
        )
    return 1


def _choices(value: Any, name: str) -> tuple[list[str], list[str]]:
    """The texts of the choices, and what each is called."""
    labels: list[str] = []
    if isinstance(value, str):
        parts = _LETTERED.split(value)[1:]
        labels, value = parts[::2], [text.strip() for text in parts[1::2]]
    elif isinstance(value, dict):
        given, value = value.get("label") or [], value.get("text")
        labels = [str(label) for label in given] if isinstance(given, list) else [str(given)]
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise RowError(name, "must be a list of texts, none of them empty")
    if len(value) < 2:
        raise RowError(name, f"has {len(value)} choices; there must be at least 2")
    labels = labels or [chr(ord("A") + place) for place in range(len(value))]
    if len(labels) != len(value) or len(set(labels)) < len(labels):
        raise RowError(name, "must have one label for each choice, all different")
    return value, labels


def _right(value: Any, texts: list[str], labels: list[str], name: str) -> int | _Place:
    """The place of the right choice from 0, or a number that is one from 0 or 1.

    A text is looked for among the choices, then among their labels. A number is a label where labels are numbers.
    """
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, str):
        lettered = _LETTERED.match(value)
        for name_of_choice, among in (
            (value.strip(), texts),
            (value.strip(), labels),
            (lettered and lettered[1], labels),
        ):
            if name_of_choice in among:
                return among.index(name_of_choice)
        if value.strip().isascii() and value.strip().isdecimal() and len(value) < 10:
            return _Place(int(value))
    elif is_number and str(value) in labels:
        return labels.index(str(value))
    elif is_number:
        return _Place(value)
    raise RowError(name, f"is {value!r}, which is no choice: no text, label or place of one")


def multiple_choice(
    loaded: LoadedModel,
    questions: Items[Question],
    *,
    render: str = "text",
    options: ChatOptions = DEFAULT_CHAT,
    batch_rows: int = 8,
    mesh: Mesh | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> TaskResult:
    """Scores every choice of every question.

    Returns:
      metrics acc, acc_norm, acc_bytes (share of questions where the choice that scores best is the right one; the
      first of equals counts as the best).

    Raises:
      InputError: a bad option, or a question that the model cannot take.
    """
    chat = is_chat(loaded, render)
    encoded = [
        encode_choices(
            loaded, question.prompt, question.choices, chat=chat, name=question.where, options=options
        )
        for question in questions.items
    ]
    all_logps = choice_logps(loaded, encoded, batch_rows=batch_rows, mesh=mesh, progress=progress)
    rows = []
    for question, logps in zip(questions.items, all_logps, strict=True):
        best = {
            "acc": int(logps.argmax()),
            "acc_norm": int((logps / [len(text) for text in question.choices]).argmax()),
            "acc_bytes": int((logps / [len(text.encode()) for text in question.choices]).argmax()),
        }
        rows.append(
            {
                "id": question.key,
                "prompt": question.prompt,
                "choices": list(question.choices),
                "right": question.right,
                "logps": logps.tolist(),
                "best": best,
                # A choice may stand there twice (in CommonsenseQA it does); either is the right text.
                "metrics": {
                    name: (float(question.choices[place] == question.choices[question.right]), 1.0)
                    for name, place in best.items()
                },
            }
        )
    counts = {"skipped_rows": questions.skipped, "choices": sum(len(item.tokens) for item in encoded)}
    return summarize(rows, counts=counts, by_type={}, bootstrap=bootstrap, seed=seed, shares=True)


def from_config(
    config: Config, loaded: LoadedModel, *, mesh: Mesh, progress: Progress | None = None
) -> TaskResult:
    """The evaluation that `config` names.

    Raises:
      InputError: anything wrong with config or data.
    """
    questions = load_questions(
        config.data.eval,
        prompt=config.data.prompt,
        choices=config.data.choices,
        answer=config.data.answer,
        count_from=config.data.count_from,
        first=config.data.first,
        on_bad_row=config.data.on_bad_row,
    )
    data = print_data(
        len(questions.items), config.data.eval, first=config.data.first, skipped=questions.skipped
    )
    result = multiple_choice(
        loaded,
        questions,
        render=config.data.render,
        options=chat_options(config),
        batch_rows=config.eval.batch_rows,
        mesh=mesh,
        bootstrap=config.eval.bootstrap,
        seed=config.seed,
        progress=progress,
    )
    return dataclasses.replace(result, data=data)
