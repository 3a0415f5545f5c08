"""Arithmetic problems, made from a seed: the kinds of GPT-3 (arXiv:2005.14165, section 3.9.1).

2D+ is the sum of two numbers drawn from 0 to 99, 2D- their difference (which may be negative), and so for 3, 4 and 5
digits; 2Dx is the product of two such numbers; 1DC is a composite of three numbers from 0 to 9, such as 6+(4*8).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from posttrain_jax.core.errors import InputError
from posttrain_jax.data.sources import Row

KINDS = ("2D+", "2D-", "3D+", "3D-", "4D+", "4D-", "5D+", "5D-", "2Dx", "1DC")
WORDS = {"+": "plus", "-": "minus", "x": "times"}
PREFIX = "arithmetic:"


def arithmetic_rows(source: str, *, seed: int) -> Iterator[Row]:
    """The rows of "arithmetic:COUNT": id, kind, question, answer; the kinds take turns.

    Raises:
      InputError: COUNT is not a positive whole number.
    """
    count = source.removeprefix(PREFIX)
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"data.eval is {source!r}; write {PREFIX}COUNT with a positive whole number.")
    random = np.random.default_rng(seed)
    return (Row(_problem(KINDS[n % len(KINDS)], n, random), source, n + 1) for n in range(int(count)))


def _problem(kind: str, number: int, random: np.random.Generator) -> dict[str, str | int]:
    digits, operator = int(kind[0]), kind[2]
    a, b, c = (int(drawn) for drawn in random.integers(0, 10**digits, size=3))
    if operator == "C":
        outer, inner = random.choice(["+", "-", "*"], size=2)
        question = f"What is {a}{outer}({b}{inner}{c})?"
        answer = _apply(outer, a, _apply(inner, b, c))
    else:
        question = f"What is {a} {WORDS[operator]} {b}?"
        answer = _apply(operator, a, b)
    return {"id": number, "kind": kind, "question": question, "answer": str(answer)}


def _apply(operator: str, a: int, b: int) -> int:
    if operator == "+":
        return a + b
    return a - b if operator == "-" else a * b
