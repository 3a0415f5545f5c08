"""Rows of preferences, in the formats that people have, as one internal form.

A `Preference` is one prompt, K completions, and what people said of them: comparisons of two completions (a partial
order, each with a weight), or a rating or a good/bad label of every completion. A row's format is told by its columns,
the first that matches:

    chosen + rejected              after `prompt` (text, or messages), after `conversations` (ShareGPT) or `messages`,
                                   or whole chats (or texts) whose common beginning is the prompt
    chosen_messages + rejected_messages   whole chats
    prompt + completions           K of them, with `ranks` (1 = best, equal = tie), `scores`, or `ratings` by rater
    prompt + completion + label    or messages + label: good (true) or bad (KTO)
    prompt + completion + rating   a number, or `ratings` by rater

A pair may say how much better: `margin`, a number or one of MARGINS; or `chosen_score` and `rejected_score`
(`score_chosen`, `score_rejected`), whose difference is the margin; `probability` that chosen is the better one (a soft
label; below 1/2 the comparison is turned round, margin and all), and `weight`. `subset` names a
part of a benchmark, for reports. Chats may have `system` and `tools` columns, as in `formats.py`. Other columns are
ignored.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from posttrain_jax.data.formats import (
    Conversation,
    Message,
    describe_kind,
    prompt_completion,
    read_messages,
    read_sharegpt,
    read_tools,
    with_system,
)
from posttrain_jax.data.sources import RowError

# Llama 2's four degrees of preference (arXiv:2307.09288, table 27, "margin small").
MARGINS = {
    "significantly better": 1.0,
    "better": 2 / 3,
    "slightly better": 1 / 3,
    "negligibly better": 0.0,
    "unsure": 0.0,
}
_DIALOGUE_TURN = "\n\nAssistant:"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Completion `better` was preferred to completion `worse` (places among the completions).

    Attributes:
      weight: how much the comparison counts.
      margin: how much better, in the data's own unit; 0 = not said.
      probability: that `better` is the better one, 1/2 or more; 1 = a hard label.
    """

    better: int
    worse: int
    weight: float = 1.0
    margin: float = 0.0
    probability: float = 1.0


@dataclasses.dataclass(frozen=True)
class Preference:
    """One prompt, K completions, and what is known of them.

    Attributes:
      completions: each with the prompt before it; only the completion's own assistant turns are trained.
      comparisons: the partial order; a tie is no comparison.
      ratings: a number for each completion, or ().
      raters: each rater's numbers for the completions (NaN = not rated), by name.
      label: whether the only completion is good (KTO), or None.
      ties: how many pairs were said to be equal.
      subset: which part of a benchmark the row belongs to (its column `subset`), or "".
    """

    completions: tuple[Conversation, ...]
    comparisons: tuple[Comparison, ...] = ()
    ratings: tuple[float, ...] = ()
    raters: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    label: bool | None = None
    ties: int = 0
    subset: str = ""


def to_preference(row: dict[str, Any]) -> Preference:
    """Converts one row of any known format. Raises RowError with the column and the reason."""
    preference = _preference(row)
    subset = row.get("subset")
    return dataclasses.replace(preference, subset=subset) if isinstance(subset, str) else preference


def _preference(row: dict[str, Any]) -> Preference:
    if "chosen" in row or "rejected" in row:
        return _pair(row, "chosen", "rejected")
    if "chosen_messages" in row or "rejected_messages" in row:
        return _pair(row, "chosen_messages", "rejected_messages")
    if "completions" in row:
        return _ranked(row)
    if "label" in row:
        return _labelled(row)
    if "completion" in row and ("rating" in row or "ratings" in row):
        return _rated(row)
    columns = ", ".join(row) if row else "none"
    raise RowError(
        "(row)",
        f"has columns {columns}, but a preference needs chosen + rejected, completions with ranks or scores, "
        "completion (or messages) + label, or completion + rating",
    )


# ---- pairs


def _pair(row: dict[str, Any], chosen: str, rejected: str) -> Preference:
    for column in (chosen, rejected):
        if row.get(column) is None:
            raise RowError(column, "is null" if column in row else "is missing")
        if not row[column] or (isinstance(row[column], str) and not row[column].strip()):
            raise RowError(column, "is empty")
    if row[chosen] == row[rejected]:
        raise RowError(rejected, "is the same as chosen, so there is nothing to prefer")
    has_prompt = bool({"prompt", "conversations", "messages"} & row.keys())
    if has_prompt and not (_is_whole_chat(row[chosen]) and _is_whole_chat(row[rejected])):
        prompt = _prompt(row)
        sides = [_completion(prompt, row[column], column, row) for column in (chosen, rejected)]
    else:
        sides = _whole_sides(row, chosen, rejected)
    if sides[0] == sides[1]:
        raise RowError(rejected, "is the same as chosen, so there is nothing to prefer")
    weight, margin = _number(row, "weight", 1.0, least=0.0), _margin(row)
    probability = _number(row, "probability", 1.0, least=0.0, most=1.0)
    if probability >= 0.5:
        comparison = Comparison(0, 1, weight, margin, probability)
    else:
        comparison = Comparison(1, 0, weight, -margin, 1.0 - probability)
    return Preference(completions=tuple(sides), comparisons=(comparison,))


Prompt = str | list[Message]


def _is_whole_chat(side: Any) -> bool:
    """Whether a side repeats its prompt (as UltraFeedback's files do): a chat that another than the assistant opens."""
    if not (isinstance(side, list) and side and isinstance(side[0], dict)):
        return False
    return side[0].get("role", side[0].get("from")) not in ("assistant", "gpt")


def _prompt(row: dict[str, Any]) -> Prompt:
    """The prompt as text or as messages that are not trained."""
    if row.get("prompt") is not None:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return prompt
        messages = read_messages(prompt, "prompt")
    elif row.get("conversations") is not None:
        messages = read_sharegpt(row["conversations"])
    elif row.get("messages") is not None:
        messages = read_messages(row["messages"], "messages")
    else:
        column = next(name for name in ("prompt", "conversations", "messages") if name in row)
        raise RowError(column, "is null")
    return [(message, False) for message, _ in messages]


def _completion(prompt: Prompt, value: Any, column: str, row: dict[str, Any]) -> Conversation:
    """The prompt with one completion: text after text, or messages (or a text as one turn) after messages."""
    if isinstance(prompt, str):
        if isinstance(value, str):
            return prompt_completion(prompt, value, column)
        prompt = [({"role": "user", "content": prompt}, False)]
    messages = _completion_messages(value, column)
    if not any(trained for _, trained in messages):
        raise RowError(column, "has no assistant turn")
    whole = [*with_system(prompt, row), *messages]
    return Conversation(
        messages=tuple(message for message, _ in whole),
        trained=tuple(trained for _, trained in whole),
        tools=read_tools(row.get("tools")),
    )


def _completion_messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise RowError(column, "is empty")
        return [({"role": "assistant", "content": value}, True)]
    items = [value] if isinstance(value, dict) else value
    if isinstance(items, list) and items and isinstance(items[0], dict) and "from" in items[0]:
        return read_sharegpt(items, column)
    return read_messages(items, column)


def _whole_sides(row: dict[str, Any], chosen: str, rejected: str) -> list[Conversation]:
    """Both sides with their prompt inside; it is what they have in common."""
    if isinstance(row[chosen], str) and isinstance(row[rejected], str):
        at = _common_prompt(row[chosen], row[rejected])
        return [prompt_completion(row[c][:at], row[c][at:], c) for c in (chosen, rejected)]
    first, second = (_completion_messages(row[column], column) for column in (chosen, rejected))
    shared = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    )
    if shared == 0:
        raise RowError(rejected, f"does not begin with the same prompt as {chosen}")
    rest = (first[shared:], second[shared:])
    for column, messages in zip((chosen, rejected), rest, strict=True):
        if not messages:
            raise RowError(column, "ends where the other side goes on, so it has no completion of its own")
        if messages[0][0]["role"] != "assistant":
            raise RowError(
                column, "has another prompt than the other side; the two answer different questions"
            )
    prompt: Prompt = [(message, False) for message, _ in first[:shared]]
    return [
        _completion(prompt, [m for m, _ in messages], column, row)
        for column, messages in zip((chosen, rejected), rest, strict=True)
    ]


def _common_prompt(chosen: str, rejected: str) -> int:
    """How many characters of two texts are the prompt: up to the last "Assistant:" that both have, else up to the last
    blank before they part (as Anthropic's HH files and TRL's implicit prompts are read)."""
    pairs = zip(chosen, rejected, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    turn = chosen.rfind(_DIALOGUE_TURN, 0, same)
    if turn >= 0:
        return turn + len(_DIALOGUE_TURN)
    return max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same), 0)


def _margin(row: dict[str, Any]) -> float:
    margin = row.get("margin")
    if isinstance(margin, str):
        if margin.lower() not in MARGINS:
            raise RowError("margin", f"is {margin!r}; use a number or one of {', '.join(MARGINS)}")
        return MARGINS[margin.lower()]
    if margin is not None:
        return _number(row, "margin", 0.0)
    for chosen, rejected in (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")):
        if row.get(chosen) is not None and row.get(rejected) is not None:
            return _number(row, chosen, 0.0) - _number(row, rejected, 0.0)
    return 0.0


# ---- K completions, labels, ratings


def _ranked(row: dict[str, Any]) -> Preference:
    values = row["completions"]
    if not isinstance(values, list) or len(values) < 2:
        count = f"{len(values)}" if isinstance(values, list) else describe_kind(values)
        raise RowError("completions", f"must be a list of at least two completions to compare, not {count}")
    prompt = _prompt(row)
    sides = tuple(_completion(prompt, v, f"completions[{i}]", row) for i, v in enumerate(values))
    if row.get("ratings") is not None:
        raters = _raters_of_many(row["ratings"], len(sides))
        ratings = tuple(_mean([scores[i] for scores in raters.values()], i) for i in range(len(sides)))
        comparisons, ties = _order(ratings, margins=True)
        return Preference(sides, comparisons, ratings, raters, ties=ties)
    if row.get("scores") is not None:
        ratings = _numbers(row["scores"], "scores", len(sides))
        comparisons, ties = _order(ratings, margins=True)
        return Preference(sides, comparisons, ratings, ties=ties)
    if row.get("ranks") is None:
        raise RowError("ranks", "is missing (the row has completions); give ranks, scores or ratings")
    ranks = _numbers(row["ranks"], "ranks", len(sides))
    comparisons, ties = _order([-rank for rank in ranks], margins=False)
    if not comparisons:
        raise RowError("completions", "are all tied, so there is nothing to prefer")
    return Preference(sides, comparisons, ties=ties)


def _order(values: Sequence[float], *, margins: bool) -> tuple[tuple[Comparison, ...], int]:
    """Every pair whose values differ, the larger first, and how many pairs tie."""
    comparisons = []
    ties = 0
    for i, j in itertools.combinations(range(len(values)), 2):
        if values[i] == values[j]:
            ties += 1
            continue
        better, worse = (i, j) if values[i] > values[j] else (j, i)
        margin = abs(values[i] - values[j]) if margins else 0.0
        comparisons.append(Comparison(better, worse, margin=margin))
    return tuple(comparisons), ties


def _labelled(row: dict[str, Any]) -> Preference:
    label = row["label"]
    if isinstance(label, int) and label in (0, 1):
        label = bool(label)
    if not isinstance(label, bool):
        raise RowError("label", f"is {label!r}, not a boolean (true = good, false = bad)")
    return Preference(completions=(_one_completion(row),), label=label)


def _rated(row: dict[str, Any]) -> Preference:
    raters: dict[str, tuple[float, ...]] = {}
    if row.get("ratings") is not None:
        raters = {name: (value,) for name, value in _raters(row["ratings"], "ratings").items()}
    if row.get("rating") is not None:
        rating = _number(row, "rating", 0.0)
    elif raters:
        rating = _mean([scores[0] for scores in raters.values()], 0)
    else:
        raise RowError("rating", "is null")
    return Preference(completions=(_one_completion(row),), ratings=(rating,), raters=raters)


def _one_completion(row: dict[str, Any]) -> Conversation:
    """prompt + completion; or a whole chat, whose last assistant turn is the completion."""
    if "completion" in row:
        if row["completion"] is None:
            raise RowError("completion", "is null")
        if row.get("prompt") is None and not {"conversations", "messages"} & row.keys():
            raise RowError("prompt", "is null" if "prompt" in row else "is missing")
        return _completion(_prompt(row), row["completion"], "completion", row)
    if row.get("messages") is not None:
        messages, column = read_messages(row["messages"], "messages"), "messages"
    elif row.get("conversations") is not None:
        messages, column = read_sharegpt(row["conversations"]), "conversations"
    else:
        raise RowError("completion", "is missing (the row has a label)")
    if messages[-1][0]["role"] != "assistant" or len(messages) < 2:
        raise RowError(column, "must end with the assistant's turn that is labelled")
    prompt: Prompt = [(message, False) for message, _ in messages[:-1]]
    return _completion(prompt, [messages[-1][0]], column, row)


def _raters_of_many(value: Any, count: int) -> dict[str, tuple[float, ...]]:
    """{rater: a number for every completion}; a rater that did not rate one has NaN there."""
    if not isinstance(value, list) or len(value) != count:
        raise RowError("ratings", f"must be a list of {count}, one set of ratings for each completion")
    each = [_raters(item, f"ratings[{i}]") for i, item in enumerate(value)]
    names = sorted({name for ratings in each for name in ratings})
    return {name: tuple(ratings.get(name, math.nan) for ratings in each) for name in names}


def _raters(value: Any, column: str) -> dict[str, float]:
    if isinstance(value, list):
        raise RowError(column, 'is a list without rater ids; write {"rater id": number, ...}')
    if not isinstance(value, dict) or not value:
        raise RowError(column, f'is {describe_kind(value)}; write {{"rater id": number, ...}}')
    return {str(name): _number(value, name, math.nan, where=f"{column}.{name}") for name in value}


def _mean(values: Sequence[float], place: int) -> float:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        raise RowError(f"ratings[{place}]", "holds no number")
    return math.fsum(known) / len(known)


def _numbers(value: Any, column: str, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        size = len(value) if isinstance(value, list) else describe_kind(value)
        raise RowError(column, f"must be a list of {count} numbers, one for each completion, not {size}")
    return tuple(_number({column: item}, column, 0.0, where=f"{column}[{i}]") for i, item in enumerate(value))


def _number(
    row: dict[str, Any],
    key: str,
    default: float,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    where: str = "",
) -> float:
    value = row.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(where or key, f"is {value!r}, not a finite number")
    if not least <= value <= most:
        raise RowError(where or key, f"is {value!r}; it must lie between {least:g} and {most:g}")
    return float(value)
