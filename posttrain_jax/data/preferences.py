"""Rows of preferences, in the formats that people have, as one internal form.

A `Preference` is one prompt, K completions, and what people think of them: comparisons of two completions (a partial
order, each with a weight), or a rating or a good/bad label of every completion. A row's columns decide its format, the
first that matches:

    chosen + rejected              after the prompt, or whole chats (or texts) whose common beginning is the prompt
    chosen_messages + rejected_messages   the same
    completions                    K of them, with `ranks` (1 = best, equal = tie), `scores`, or `ratings` by rater
    completion + label             or messages + label: good (true) or bad (KTO)
    completion + rating            a number, or `ratings` by rater

The prompt is `prompt` (text, or messages), `conversations` (ShareGPT), `messages`, or the user's turn that columns make
up (`question`, `instruction` with `input`, see `formats.py`). Text after a text `prompt` is plain text unless `text_as`
is "chat"; all else are chats, with `system`, `history` and `tools` as in `formats.py`. A completion that repeats the
prompt is taken without it, and counted. What becomes of other columns says `rows.py`.

A pair may say how much better: `margin`, a number or one of MARGINS; or `chosen_score` and `rejected_score`
(`score_chosen`, `score_rejected`), whose difference is the margin; `probability` that chosen is the better one (a soft
label; below 1/2 the comparison is turned round, margin and all), and `weight`. `subset` names a part of a benchmark,
for reports. A number or a label may be text, as all cells of a CSV file are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.data.formats import Conversation, texts_of
from posttrain_jax.data.messages import describe_kind, read_messages
from posttrain_jax.data.prompt_completions import PromptCompletions, last_turn, read_completions
from posttrain_jax.data.rows import Columns, RowError, as_boolean

# Llama 2's four degrees of preference (arXiv:2307.09288, table 27, "margin small").
MARGINS = {
    "significantly better": 1.0,
    "better": 2 / 3,
    "slightly better": 1 / 3,
    "negligibly better": 0.0,
    "unsure": 0.0,
}
_CHATS = ("messages", "conversations")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_LARGEST = 1e38
"""Numbers are kept in 32 bits, and the difference of two must fit, too."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Completion `better` was preferred to completion `worse` (indices of the completions).

    Attributes:
      weight: how much the comparison counts.
      margin: how much better, in the data's own unit; 0 = not given.
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
      ranks: a whole number for each completion, 0 = best, equal = tied.
      ties: how many pairs are equally good.
      subset: which part of a benchmark the row belongs to (its column `subset`), or "".
      repeated: whether the completions repeated the prompt, which is taken once.
      unused: columns of the row that were not used, see `rows.py`.
    """

    completions: tuple[Conversation, ...]
    ranks: tuple[int, ...]
    comparisons: tuple[Comparison, ...] = ()
    ratings: tuple[float, ...] = ()
    raters: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    label: bool | None = None
    ties: int = 0
    subset: str = ""
    repeated: bool = False
    unused: tuple[str, ...] = ()


def to_preference(row: Mapping[str, Any], *, text_as: str = "plain") -> Preference:
    """Converts one row of any known format. Raises RowError with the column and the reason."""
    columns = Columns(row)
    preference = _preference(columns, text_as)
    subset = columns.get("subset", "")
    if isinstance(subset, list | dict):
        raise RowError("subset", f"is {describe_kind(subset)}, not the name of a part")
    texts = [texts_of(completion) for completion in preference.completions]
    unused = columns.unused(
        [text for prompt, _ in texts for text in prompt],
        [text for _, completions in texts for text in completions],
        is_chat=bool(preference.completions[0].messages),
        needs_prompt=True,
    )
    return dataclasses.replace(preference, subset="" if subset is None else str(subset), unused=unused)


def _preference(row: Columns, text_as: str) -> Preference:
    # A row that only a null column makes one of a format is refused for the null.
    for names in (row.given, set(row)):
        if "chosen" in names or "rejected" in names:
            return _pair(row, "chosen", "rejected", text_as)
        if "chosen_messages" in names or "rejected_messages" in names:
            return _pair(row, "chosen_messages", "rejected_messages", text_as)
        if "completions" in names:
            return _ranked(row, text_as)
        if "label" in names:
            return _labeled(row, text_as)
        if "completion" in names and not names.isdisjoint(("rating", "ratings")):
            return _rated(row, text_as)
    raise RowError(
        "(row)",
        f"has columns {', '.join(row) if row else 'none'}, but a preference needs chosen + rejected, completions with "
        "ranks or scores, completion (or messages) + label, or completion + rating; rename its columns",
    )


# ---- pairs


def _pair(row: Columns, chosen: str, rejected: str, text_as: str) -> Preference:
    for column in (chosen, rejected):
        if row.get(column) is None:
            raise RowError(column, "is null" if column in row else "is missing")
        if not row[column] or (isinstance(row[column], str) and not row[column].strip()):
            raise RowError(column, "is empty")
    if row[chosen] == row[rejected]:
        raise RowError(rejected, "is the same as chosen, so there is nothing to prefer")
    sides = read_completions(row, {column: row[column] for column in (chosen, rejected)}, text_as)
    if sides.completions[0] == sides.completions[1]:
        raise RowError(rejected, "is the same as chosen, so there is nothing to prefer")
    weight, margin = _number(row, "weight", 1.0, least=0.0), _margin(row)
    probability = _number(row, "probability", 1.0, least=0.0, most=1.0)
    if probability >= 0.5:
        comparison = Comparison(0, 1, weight, margin, probability)
    else:
        comparison = Comparison(1, 0, weight, -margin, 1.0 - probability)
    return Preference(
        completions=sides.completions,
        comparisons=(comparison,),
        ranks=(int(probability < 0.5), int(probability > 0.5)),
        repeated=sides.repeated,
    )


def _margin(row: Columns) -> float:
    margin = row.get("margin")
    if isinstance(margin, str) and margin.lower() in MARGINS:
        return MARGINS[margin.lower()]
    if isinstance(margin, str) and math.isnan(_from_text(margin)):
        raise RowError("margin", f"is {margin!r}; use a number or one of {', '.join(MARGINS)}")
    if margin is not None:
        return _number(row, "margin", 0.0)
    for chosen, rejected in (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")):
        if {chosen, rejected} <= row.given:
            return _number(row, chosen, 0.0) - _number(row, rejected, 0.0)
    return 0.0


# ---- K completions, labels, ratings


def _ranked(row: Columns, text_as: str) -> Preference:
    values = row["completions"]
    if not isinstance(values, list) or len(values) < 2:
        size = f"{len(values)}" if isinstance(values, list) else describe_kind(values)
        raise RowError("completions", f"must be a list of at least two completions to compare, not {size}")
    sides = read_completions(row, {f"completions[{i}]": value for i, value in enumerate(values)}, text_as)
    count = len(values)
    raters: dict[str, tuple[float, ...]] = {}
    ratings: tuple[float, ...] = ()
    if row.get("ratings") is not None:
        raters = _raters_of_many(row["ratings"], count)
        ratings = tuple(_mean([scores[i] for scores in raters.values()], i) for i in range(count))
    elif row.get("scores") is not None:
        ratings = _numbers(row["scores"], "scores", count)
    elif row.get("ranks") is None:
        raise RowError("ranks", "is missing (the row has completions); give ranks, scores or ratings")
    values_up = ratings or tuple(-rank for rank in _numbers(row["ranks"], "ranks", count))
    comparisons, ties = _order(values_up, margins=bool(ratings))
    if not comparisons and not ratings:
        raise RowError("completions", "are all tied, so there is nothing to prefer")
    rank_of = {value: rank for rank, value in enumerate(sorted(set(values_up), reverse=True))}
    return Preference(
        completions=sides.completions,
        comparisons=comparisons,
        ratings=ratings,
        raters=raters,
        ranks=tuple(rank_of[value] for value in values_up),
        ties=ties,
        repeated=sides.repeated,
    )


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


def _labeled(row: Columns, text_as: str) -> Preference:
    label = row["label"]
    is_good = as_boolean(label)
    if is_good is None:
        raise RowError("label", f"is {label!r}, not a boolean (true = good, false = bad)")
    side = _one_completion(row, text_as)
    return Preference(completions=side.completions, label=is_good, ranks=(0,), repeated=side.repeated)


def _rated(row: Columns, text_as: str) -> Preference:
    raters: dict[str, tuple[float, ...]] = {}
    if row.get("ratings") is not None:
        raters = {name: (value,) for name, value in _raters(row["ratings"], "ratings").items()}
    if row.get("rating") is not None:
        rating = _number(row, "rating", 0.0)
    elif raters:
        rating = _mean([scores[0] for scores in raters.values()], 0)
    else:
        raise RowError("rating", "is null")
    side = _one_completion(row, text_as)
    return Preference(
        completions=side.completions, ratings=(rating,), raters=raters, ranks=(0,), repeated=side.repeated
    )


def _one_completion(row: Columns, text_as: str) -> PromptCompletions:
    """prompt + completion; or a whole chat, whose last assistant turn is the completion."""
    if "completion" in row.given or ("completion" in row and row.given.isdisjoint(_CHATS)):
        if row["completion"] is None:
            raise RowError("completion", "is null")
        return read_completions(row, {"completion": row["completion"]}, text_as)
    for column in _CHATS:
        if column in row.given:
            return last_turn(row, read_messages(row[column], column), column)
    raise RowError("completion", "is missing (the row has a label)")


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
    row: Mapping[str, Any],
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
    given = _from_text(value) if isinstance(value, str) else value
    number = math.nan
    if isinstance(given, int | float) and not isinstance(given, bool) and abs(given) <= _LARGEST:
        number = float(given)
    if math.isnan(number):
        raise RowError(where or key, f"is {value!r}, not a finite number (at most {_LARGEST:g})")
    if not least <= number <= most:
        raise RowError(where or key, f"is {value!r}; it must lie between {least:g} and {most:g}")
    return number


def _from_text(text: str) -> float:
    """The number that a text is, as in a cell of a CSV file; NaN where it is none."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else math.nan
