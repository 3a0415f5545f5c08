"""Rewards by rules: what each gives, by hand, and once through the processes that run them."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards import rules
from posttrain_jax.rewards.completion import Completion
from posttrain_jax.rewards.workers import PythonReward, RewardWorkers


def answer(text, *, tokens=0, **row):
    return Completion("?", (), text, (7,) * tokens, "stop", row)


def cut(text, **changes):
    """An answer that hit the limit, to a question whose answer is 42."""
    given = {"prompt": "?", "in_thought": False, **changes}
    return Completion(given["prompt"], (), text, (7,), "length", {"answer": "42"}, given["in_thought"])


@pytest.mark.parametrize("rule", [rules.exact_match, rules.same_number, rules.same_result])
def test_an_answer_that_was_cut_off_inside_its_thought_has_no_result(rule):
    unfinished = [
        cut("<think>42"),
        cut("\n<think>\n42"),
        cut("42", in_thought=True),  # the chat template wrote <think>
        cut("42", prompt="What is 6 * 7? <think>\n"),
        cut("<think>a</think> b <think>42"),
        cut("Let me see. <think>\n42"),
        cut("<think>a</think><answer>42"),
        cut("<think><answer>42</answer>"),
    ]
    assert rule(unfinished) == [0.0] * len(unfinished)
    finished = [
        cut("<think>40 + 2</think>42"),
        cut("40 + 2</think>42", in_thought=True),
        cut("40 + 2</think><answer>42</answer> and", in_thought=True),
        cut("42"),
        cut("42", prompt="In `<think>` say what 6 * 7 is."),
    ]
    assert rule(finished) == [1.0] * len(finished)
    nothing = Completion("?", (), "<think>so", (7,), "length", {"answer": "0"})
    assert rule([nothing]) == [0.0]


def test_exact_match():
    answers = [
        answer(" Paris\n", answer="Paris"),
        answer("paris", answer="Paris"),
        answer("<think>Rome? no</think> Paris", answer="Paris"),
        answer("<answer>Rome</answer> no: <answer>Paris</answer>", answer="Paris"),
        answer("4", answer=4),
    ]
    assert rules.exact_match(answers) == [1.0, 0.0, 1.0, 1.0, 1.0]
    assert rules.exact_match([answer("x", reference="x")], column="reference") == [1.0]


def test_same_number():
    solution = "Half of 48 is <<48/2=24>>24, and 48 + 24 = 72.\n#### 72"
    answers = [
        answer("She sold 72 clips.", answer=solution),
        answer("72.0", answer="72 clips"),
        answer("48", answer=solution),
        answer("", answer=solution),
        answer("#### 72\nQuestion: what is 5?", answer=72),
        answer("<think>48 + 24</think><answer>72</answer> 5", answer=72.0),
        answer("1,200 dollars", answer="$1200"),
    ]
    assert rules.same_number(answers) == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    minus = [answer("x = \u22123", answer=wanted) for wanted in ("3", "-3", "#### \u22123\nso 3")]
    assert rules.same_number(minus) == [0.0, 1.0, 1.0]
    assert rules.same_number([answer("It is 1/3.", answer=r"\frac{1}{3}"), answer("5", answer=1e5)]) == [
        1.0,
        0.0,
    ]
    for unreadable in ("none", "3:30", r"\sqrt{2}"):
        with pytest.raises(InputError, match="holds no number that can be read"):
            rules.same_number([answer("1", answer=unreadable)])


@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": True}, {"answer": ["4"]}])
def test_a_row_without_a_reference(row):
    for rule in (rules.exact_match, rules.same_number, rules.same_result):
        with pytest.raises(InputError, match="no text or number in the column answer"):
            rule([answer("4", **row)])


def test_same_result():
    answers = [
        answer(r"So it is \boxed{\frac{1}{2}}.", answer="0.5"),
        answer("It is 9 apples.", answer="Count.\n#### 9"),
        answer("<think>8</think> The answer is 3.", answer="4"),
        answer("I do not know", answer="4"),
        answer("x = \u22123", answer="-3"),
        answer("x = \u22123", answer="3"),
        answer("1e5", answer="100000"),
        answer("1e5", answer="1"),
        answer("\uff14\uff12", answer="42"),
        answer("1 1/2", answer="1.5"),
        answer("5½", answer="5.5"),
    ]
    assert rules.same_result(answers) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_same_result_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[eval\]'"):
        rules.same_result([])


def test_contains():
    answers = [answer("Yours sincerely"), answer("yours, truly"), answer("")]
    assert rules.contains(answers, texts=["Yours", "truly"]) == [0.5, 0.5, 0.0]
    assert rules.contains(answers, texts=["Yours", "truly"], ignore_case=True) == [0.5, 1.0, 0.0]
    for texts in ("Yours", []):
        with pytest.raises(InputError, match="write a list of one text or more"):
            rules.contains(answers, texts=texts)


def test_matches():
    answers = [answer("a\nb."), answer("a\nb"), answer("x a\nb.")]
    assert rules.matches(answers, pattern=r"a.*\.") == [1.0, 0.0, 0.0]
    with pytest.raises(InputError, match="is no regular expression"):
        rules.matches([], pattern="(")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>2 + 2</think> <answer>4</answer>", 1.0),
        ("<think>\na\nb\n</think>\n<answer>\n4\n</answer>\n", 1.0),
        ("<think>2 + 2</think> 4", 0.0),
        ("<answer>4</answer> <think>2 + 2</think>", 0.0),
        ("<think>2 + 2</think> <answer>4</answer> and more", 0.0),
        ("so <think>2 + 2</think> <answer>4</answer>", 0.0),
        ("<think></think> <answer>4</answer>", 0.0),
        ("<think>a</think> <answer> </answer>", 0.0),
        ("<think>a</think> b <answer>4</answer>", 0.0),
        ("<think>a</think> <answer>3</answer> <answer>4</answer>", 0.0),
        ("<think>a <think>b</think> <answer>4</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_think_answer_format(text, score):
    assert rules.think_answer_format([answer(text)]) == [score]
    if text.startswith("<think>"):
        rest = answer(text.removeprefix("<think>"))
        assert rules.think_answer_format([rest], opened=True) == [score]
        assert rules.think_answer_format([dataclasses.replace(rest, in_thought=True)]) == [score]


def test_lengths():
    answers = [answer("", tokens=count) for count in (0, 3, 9)]
    assert rules.token_count(answers) == [0.0, 3.0, 9.0]
    assert rules.length_within(answers, least=1, most=9) == [0.0, 1.0, 1.0]
    assert rules.length_within(answers, most=3) == [1.0, 1.0, 0.0]


def test_soft_overlong():
    """The paper's numbers: 0 up to 20480 - 4096 = 16384 tokens, half way (18432) -0.5, -1 at 20480 and beyond; one
    token too many costs 1 / 4096 = 0.00024414."""
    completions = [answer("", tokens=n) for n in (0, 16_384, 16_385, 18_432, 20_480, 30_000)]
    found = rules.soft_overlong(completions, max_length=20_480, cache=4_096)
    assert found == pytest.approx([0.0, 0.0, -0.00024414, -0.5, -1.0, -1.0], abs=1e-8)
    for cache in (0, 11):
        with pytest.raises(InputError, match="write 1 to 10"):
            rules.soft_overlong([], max_length=10, cache=cache)


def test_repeated_share():
    """ "a b a b a" has the pairs ab, ba, ab, ba: 2 of 4 are repeats. "a a a a" has 3 pairs, 2 of them repeats, and one
    4-gram."""
    answers = [answer("a b a b a"), answer("a a  a\na"), answer("a b c"), answer("a"), answer("")]
    found = rules.repeated_share(answers, n=2)
    np.testing.assert_allclose(found, [0.5, 2 / 3, 0.0, 0.0, 0.0])
    assert rules.repeated_share(answers) == [0.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(InputError, match="n of 1 or more"):
        rules.repeated_share(answers, n=0)


def test_real_problems_through_the_workers(demo_path):
    """Every one of the 100 GSM8K solutions is right by both rules, the next problem's number is mostly wrong, and an
    expression that runs away costs its own answer only."""
    rows = json.loads(demo_path("gsm8k_100").read_bytes())
    rows = rows["pairs"] if isinstance(rows, dict) else rows
    right = [answer(row["chain_of_thought"], answer=row["target_answer"]) for row in rows]
    shifted = [
        answer(other["chain_of_thought"], answer=row["target_answer"])
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    endless = [answer("a" * 40 + "!", answer="1")]
    functions = {
        "number": PythonReward("posttrain_jax.rewards.rules:same_number", completions_per_call=25),
        "result": PythonReward("posttrain_jax.rewards.rules:same_result", seconds=20.0),
        "format": PythonReward(
            "posttrain_jax.rewards.rules:matches", arguments={"pattern": "(a+)+b|[^a].*"}, seconds=2.0
        ),
    }
    with RewardWorkers(functions) as workers:
        found = workers.score(right + shifted + endless)
    assert found["number"].counts == found["result"].counts == dict.fromkeys(found["number"].counts, 0)
    for name in ("number", "result"):
        scores = found[name].scores_N
        assert scores[:100].sum() == 100 and scores[100:200].sum() < 10, name
    assert found["format"].failures[-1] == "timed_out" and found["format"].counts["timed_out"] == 1
