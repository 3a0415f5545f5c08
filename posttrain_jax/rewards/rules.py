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


def exact_match(completions: list[Completion], *, column: str = "answer") -> list[float]:
    """1 where the answer in the completion is the row's `column` to the letter, spaces around both aside; else 0."""
    scores = []
    for completion in completions:
        reference, answer = _reference(completion, column).strip(), answer_part(completion)
        scores.append(float(answer is not None and answer.strip() == reference))
    return scores


def same_number(completions: list[Completion], *, column: str = "answer") -> list[float]:
    """1 where the last number of the answer equals the last one of the row's `column`, exactly; else 0.

    For results as in GSM8K (arXiv:2110.14168): the column may be the number, "9 apples", or a solution that ends with
    `#### 9`; 1,234 and $1234.00 are equal. `rewards/numbers.py` says how numbers are read; formulas are for
    `same_result`.

    Raises:
      InputError: the column holds no number.
    """
    scores = []
    for completion in completions:
        reference = last_number(math_answers.final_part(_reference(completion, column)))
        if reference is None:
            raise InputError(
                f"The column {column} of a row holds no number that can be read: {completion.row[column]!r}."
            )
        answer = answer_part(completion)
        scores.append(float(answer is not None and last_number(math_answers.final_part(answer)) == reference))
    return scores


def same_result(completions: list[Completion], *, column: str = "answer") -> list[float]:
    """1 where math-verify finds the answer's result equal to the row's `column`, as `launch.evaluate` judges; else 0.

    A comparison that math-verify cannot finish counts as wrong. One that does not even listen to its alarm runs into
    the reward's time limit, which should be above 3 * `math_answers.ALARM_SECONDS`, as many as it may take.

    Raises:
      InputError: the package math-verify is missing.
    """
    math_answers.require_math_verify()
    scores = []
    for completion in completions:
        reference, answer = math_answers.final_part(_reference(completion, column)), answer_part(completion)
        is_right = (
            answer is not None and math_answers.compare_here(reference, math_answers.final_part(answer)).right
        )
        scores.append(float(is_right))
    return scores


def contains(
    completions: list[Completion], *, texts: Sequence[str], ignore_case: bool = False
) -> list[float]:
    """The share of `texts` that stand in the completion, 0 to 1; a negative weight makes it a list of what to avoid.

    Raises:
      InputError: there are no texts.
    """
    if isinstance(texts, str) or not texts:
        raise InputError(f"contains looks for {texts!r}; write a list of one text or more.")
    scores = []
    for completion in completions:
        text = completion.text.casefold() if ignore_case else completion.text
        present = [(part.casefold() if ignore_case else part) in text for part in texts]
        scores.append(sum(present) / len(present))
    return scores


def matches(completions: list[Completion], *, pattern: str) -> list[float]:
    """1 where the regular expression matches the whole completion ("." is a line break too), else 0.

    Raises:
      InputError: the pattern is no regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression ({error}); correct the pattern.") from error
    return [float(compiled.fullmatch(completion.text) is not None) for completion in completions]


def think_answer_format(completions: list[Completion], *, opened: bool = False) -> list[float]:
    """1 where the completion is <think> ... </think> <answer> ... </answer>, each tag once and something in it, else 0.

    The format reward of R1 (arXiv:2501.12948, section 2.2).

    Args:
      opened: the completions start inside <think>, also where their prompts do not say so (`Completion.in_thought`).
    """
    scores = []
    for completion in completions:
        text = "<think>" + completion.text if opened or completion.in_thought else completion.text
        parts = _THINK_ANSWER.fullmatch(text)
        once = all(text.count(tag) == 1 for tag in _TAGS)
        scores.append(float(parts is not None and once and all(part.strip() for part in parts.groups())))
    return scores


def token_count(completions: list[Completion]) -> list[float]:
    """How many tokens the completion has, the one that ended it included."""
    return [float(len(completion.token_ids)) for completion in completions]


def length_within(completions: list[Completion], *, least: int = 0, most: int) -> list[float]:
    """1 where the completion has from `least` to `most` tokens, else 0."""
    return [float(least <= len(completion.token_ids) <= most) for completion in completions]


def soft_overlong(completions: list[Completion], *, max_length: int, cache: int) -> list[float]:
    """DAPO's soft overlong punishment, to be added with weight 1 (arXiv:2503.14476, section 3.4): 0 up to
    max_length - cache tokens, then linear, -1 from max_length on: (max_length - cache - length) / cache.

    Args:
      max_length: L_max, tokens (20,480 in the paper).
      cache: L_cache, the tokens over which the punishment grows (4,096).

    Raises:
      InputError: cache is not between 1 and max_length.
    """
    if not 1 <= cache <= max_length:
        raise InputError(
            f"The length penalty grows over {cache} tokens of {max_length}; write 1 to {max_length}."
        )
    lengths = [len(completion.token_ids) for completion in completions]
    return [max(-1.0, min(0.0, (max_length - cache - length) / cache)) for length in lengths]


def repeated_share(completions: list[Completion], *, n: int = 4) -> list[float]:
    """The share of the completion's n-grams of words that stood there before, from 0 (none) to nearly 1; give it a
    negative weight. A completion of fewer than n words has 0.

    Raises:
      InputError: n is below 1.
    """
    if n < 1:
        raise InputError(f"repeated_share counts {n}-grams; write an n of 1 or more.")
    scores = []
    for completion in completions:
        words = completion.text.split()
        grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
        scores.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return scores


def answer_part(completion: Completion) -> str | None:
    """What stands between the last <answer> and its </answer>, else all that follows the thought; None where the
    completion was cut off inside <answer>, or has not ended its thought."""
    text = completion.after_thought()
    if text is None:
        return None
    _, opened, rest = text.rpartition("<answer>")
    if opened and "</answer>" in rest:
        return rest.partition("</answer>")[0]
    return None if opened and completion.finish_reason == "length" else text


def _reference(completion: Completion, column: str) -> str:
    value = completion.row.get(column)
    if value is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(
            f"A row has no text or number in the column {column}, which the answer is compared with; its columns are "
            f"{', '.join(completion.row)}."
        )
    return str(value)
