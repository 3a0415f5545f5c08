"""Rewards that a rule gives: right results, formats, lengths, repetitions.

Each is a function for `workers.PythonReward`, such as "posttrain_jax.rewards.rules:same_number", its settings being the
reward's `arguments`. None needs JAX. Where a row lacks the column that a rule compares with, it raises `InputError`.

The rules that compare results (`exact_match`, `same_number`, `same_result`) look at what follows the thought
(`thoughts.after_thought`), of it at what stands in <answer>, if it does. An answer that was cut off inside either has
no result, and gets 0. The others look at all that was written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards import math_answers
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.numbers import last_number

_THINK_ANSWER = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def exact_match(answers: list[Completion], *, column: str = "answer") -> list[float]:
    """1 where the answer is the row's `column` to the letter, spaces around both aside; else 0."""
    scores = []
    for answer in answers:
        wanted, found = _reference(answer, column).strip(), answer_part(answer)
        scores.append(float(found is not None and found.strip() == wanted))
    return scores


def same_number(answers: list[Completion], *, column: str = "answer") -> list[float]:
    """1 where the last number of the answer equals the last one of the row's `column`, exactly; else 0.

    For results as in GSM8K (arXiv:2110.14168): the column may be the number, "9 apples", or a solution that ends with
    `#### 9`; 1,234 and $1234.00 are equal. `rewards/numbers.py` says how numbers are read; formulas are for
    `same_result`.

    Raises:
      InputError: the column holds no number.
    """
    scores = []
    for answer in answers:
        reference = last_number(math_answers.final_part(_reference(answer, column)))
        if reference is None:
            raise InputError(
                f"The column {column} of a row holds no number that can be read: {answer.row[column]!r}."
            )
        found = answer_part(answer)
        scores.append(float(found is not None and last_number(math_answers.final_part(found)) == reference))
    return scores


def same_result(answers: list[Completion], *, column: str = "answer") -> list[float]:
    """1 where math-verify finds the answer's result equal to the row's `column`, as `launch.evaluate` judges; else 0.

    A comparison that math-verify cannot finish counts as wrong. One that does not even listen to its alarm runs into
    the reward's time limit, which should be above 3 * `math_answers.ALARM_SECONDS`, as many as it may take.

    Raises:
      InputError: the package math-verify is missing.
    """
    math_answers.require_math_verify()
    scores = []
    for answer in answers:
        wanted, found = math_answers.final_part(_reference(answer, column)), answer_part(answer)
        scores.append(
            float(
                found is not None and math_answers.compare_here(wanted, math_answers.final_part(found)).right
            )
        )
    return scores


def contains(answers: list[Completion], *, texts: Sequence[str], ignore_case: bool = False) -> list[float]:
    """The share of `texts` that stand in the answer, from 0 to 1; a negative weight makes it a list of what to avoid.

    Raises:
      InputError: there are no texts.
    """
    if isinstance(texts, str) or not texts:
        raise InputError(f"contains looks for {texts!r}; write a list of one text or more.")
    scores = []
    for answer in answers:
        text = answer.text.casefold() if ignore_case else answer.text
        found = [(wanted.casefold() if ignore_case else wanted) in text for wanted in texts]
        scores.append(sum(found) / len(found))
    return scores


def matches(answers: list[Completion], *, pattern: str) -> list[float]:
    """1 where the regular expression matches the whole answer ("." is a line break too), else 0.

    Raises:
      InputError: the pattern is no regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression ({error}); correct the pattern.") from error
    return [float(compiled.fullmatch(answer.text) is not None) for answer in answers]


def think_answer_format(answers: list[Completion], *, opened: bool = False) -> list[float]:
    """1 where the answer is <think> ... </think> <answer> ... </answer>, each tag once and something in it, else 0.

    The format reward of R1 (arXiv:2501.12948, section 2.2).

    Args:
      opened: the answers start inside <think>, also where their prompts do not say so (`Completion.in_thought`).
    """
    scores = []
    for answer in answers:
        text = "<think>" + answer.text if opened or answer.in_thought else answer.text
        parts = _THINK_ANSWER.fullmatch(text)
        once = all(text.count(tag) == 1 for tag in _TAGS)
        scores.append(float(parts is not None and once and all(part.strip() for part in parts.groups())))
    return scores


def token_count(answers: list[Completion]) -> list[float]:
    """How many tokens the answer has, the one that ended it included."""
    return [float(len(answer.token_ids)) for answer in answers]


def length_within(answers: list[Completion], *, least: int = 0, most: int) -> list[float]:
    """1 where the answer has from `least` to `most` tokens, else 0."""
    return [float(least <= len(answer.token_ids) <= most) for answer in answers]


def repeated_share(answers: list[Completion], *, n: int = 4) -> list[float]:
    """The share of the answer's n-grams of words that stood there before, from 0 (none) to nearly 1; give it a
    negative weight. An answer of fewer than n words has 0.

    Raises:
      InputError: n is below 1.
    """
    if n < 1:
        raise InputError(f"repeated_share counts {n}-grams; write an n of 1 or more.")
    scores = []
    for answer in answers:
        words = answer.text.split()
        grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
        scores.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return scores


def answer_part(answer: Completion) -> str | None:
    """What stands between the last <answer> and its </answer>, else all that follows the thought; None where the answer
    was cut off inside <answer>, or has not ended its thought."""
    text = answer.after_thought()
    if text is None:
        return None
    _, opened, rest = text.rpartition("<answer>")
    if opened and "</answer>" in rest:
        return rest.partition("</answer>")[0]
    return None if opened and answer.finish_reason == "length" else text


def _reference(answer: Completion, column: str) -> str:
    value = answer.row.get(column)
    if value is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(
            f"A row has no text or number in the column {column}, which the answer is compared with; its columns are "
            f"{', '.join(answer.row)}."
        )
    return str(value)
