"""Arithmetic and word problems: what counts as equal, what is taken for the result, and where it is asked from."""

from __future__ import annotations

import json
import re
import sys
import threading

import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.arithmetic import KINDS, arithmetic_rows
from posttrain_jax.evaluate.completions import CompletionOptions
from posttrain_jax.evaluate.math_problems import load_problems, math_problems
from posttrain_jax.rewards.math_answers import MathVerifier, final_part


@pytest.fixture(scope="module")
def judge():
    with MathVerifier() as judge:
        yield judge


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("42", "42"),
        ("42", "The answer is 42."),
        ("42", "**42**"),
        ("1/2", "The answer is 0.5"),
        ("0.5", r"So we get \boxed{\frac{1}{2}}."),
        (r"\frac{3}{4}", "Answer: 0.75"),
        ("1,234", "That makes 1234 in all."),
        ("1234", "That makes 1,234 in all."),
        ("18", "She earns $18 every day."),
        ("9 apples", "There are 9 apples in the basket."),
        ("-5", "The result is -5."),
        ("50", "It is 50%."),
        ("$x^2-1$", "It factors: $(x-1)(x+1)$"),
        (r"\sqrt{8}", r"$2\sqrt{2}$"),
        ("7", r"3 + 4 gives \boxed{7}, as on page 12."),
        ("2280", "They have 750 + 1530. The final answer is 2280. I hope it is correct."),
    ],
)
def test_equal(judge, reference, answer):
    found = judge.compare(reference, answer)
    assert found.right and found.error is None, found


@pytest.mark.parametrize(
    ("reference", "answer", "extracted"),
    [
        ("42", "43", "43"),
        ("5", "The result is -5.", "-5"),
        ("12", r"Page 12 says \boxed{7}.", "7"),
        ("4", "The answer is 3, for 4 people.", "3"),
        ("1/3", "0.33", "0.33"),
        ("3", "I do not know.", None),
        ("3", "", None),
    ],
)
def test_not_equal(judge, reference, answer, extracted):
    found = judge.compare(reference, answer)
    assert (found.right, found.extracted, found.error) == (False, extracted, None)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 4\nQuestion: what is 5 + 5?", "4"),
        ("so\n####$1,200.50 a year\n", "$1,200.50 a year"),
        ("#### 4\nno, wait\n#### -5", "-5"),
        ("#### Step 1\nadd\n#### Step 2\nThe answer is 9", "#### Step 1\nadd\n#### Step 2\nThe answer is 9"),
        ("plain 4", "plain 4"),
    ],
)
def test_the_part_of_a_solution_with_its_result(text, part):
    assert final_part(text) == part


def test_it_can_be_asked_from_any_thread(judge):
    found = []
    thread = threading.Thread(target=lambda: found.append(judge.compare("1/2", "0.5")))
    thread.start()
    thread.join()
    assert found[0].right


def test_a_comparison_that_does_not_end_is_killed_and_the_next_one_works():
    with MathVerifier(kill_seconds=1.0) as judge:
        stuck = judge.compare("1", "$9^{9^{9^{9}}}$")
        assert not stuck.right and stuck.error is not None
        assert judge.compare("1/2", "0.5").right


def test_a_missing_package_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"math-verify; install it with pip install -e '\.\[eval\]'"):
        MathVerifier()


def test_arithmetic_problems_are_right_and_come_from_the_seed():
    rows = [row.value for row in arithmetic_rows("arithmetic:200", seed=1)]
    assert [row["id"] for row in rows] == list(range(200))
    assert [row["kind"] for row in rows[:10]] == list(KINDS)
    for row in rows:
        formula = row["question"].removeprefix("What is ").removesuffix("?")
        for word, sign in (("plus", "+"), ("minus", "-"), ("times", "*")):
            formula = formula.replace(word, sign)
        assert re.fullmatch(r"[\d+*() -]+", formula)
        assert int(row["answer"]) == eval(formula)
        digits = int(row["kind"][0])
        assert all(int(number) < 10**digits for number in re.findall(r"\d+", formula))
    assert rows == [row.value for row in arithmetic_rows("arithmetic:200", seed=1)]
    assert rows != [row.value for row in arithmetic_rows("arithmetic:200", seed=2)]
    for wrong in ("arithmetic:", "arithmetic:0", "arithmetic:-3", "arithmetic:many"):
        with pytest.raises(InputError, match="write arithmetic:COUNT"):
            arithmetic_rows(wrong, seed=1)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_like_gsm8k_and_plain_ones(judge, tmp_path):
    rows = [
        {"question": "2 + 2?", "answer": "2 and 2 are <<2+2=4>>4.\n#### 4", "id": "x"},
        {"question": "Half?", "answer": 0.5, "kind": "easy"},
        {"question": "How much?", "answer": "1,200 dollars"},
    ]
    source = write(tmp_path / "p.jsonl", *rows)
    found = load_problems(source, judge, prompt="Q: {question}\nA{{:", answer="answer")
    assert [problem.key for problem in found.items] == ["x", 1, 2]
    assert [problem.reference for problem in found.items] == ["4", "0.5", "1,200 dollars"]
    assert found.items[0].prompt == "Q: 2 + 2?\nA{:"
    assert [problem.kind for problem in found.items] == ["", "easy", ""]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a"}, "line 2, answer: is missing .the columns are question"),
        ({"answer": "4"}, "line 2, question: is missing"),
        ({"question": "", "answer": "4"}, "line 2, question: is empty"),
        ({"question": "a", "answer": "Mrs. Hilt"}, "is 'Mrs. Hilt', in which math-verify finds no number"),
        ({"question": "a", "answer": "3:30 p.m."}, "a time, ratio or list"),
        ({"question": "a", "answer": "9; 11"}, "a time, ratio or list"),
        ({"question": "a", "answer": [4]}, "answer: is a list, not text"),
        ({"question": "a", "answer": "4", "id": 0}, "id: is 0, which an earlier row has"),
    ],
)
def test_a_row_that_is_no_problem_is_refused_by_line(judge, tmp_path, row, words):
    source = write(tmp_path / "p.jsonl", {"question": "2 + 2?", "answer": "4"}, row)
    with pytest.raises(InputError, match=words):
        load_problems(source, judge, prompt="{question}", answer="answer")
    found = load_problems(source, judge, prompt="{question}", answer="answer", on_bad_row="skip")
    assert (len(found.items), found.skipped) == (1, 1)


@pytest.mark.parametrize("template", ["no column", "{}", "{a.b}", "{a[0]}", "{a:>9}", "{a!r}", "{a", "a}"])
def test_a_template_that_is_none_is_refused(judge, tmp_path, template):
    source = write(tmp_path / "p.jsonl", {"a": "2 + 2?", "answer": "4"})
    with pytest.raises(InputError, match="data.prompt is "):
        load_problems(source, judge, prompt=template, answer="answer")


def test_real_word_problems(judge, demo_path):
    demo_path("gsm8k_100")
    found = load_problems("asset:gsm8k_100", judge, prompt="{text_clean}", answer="target_answer")
    assert (len(found.items), found.skipped) == (100, 0)
    assert (found.items[0].key, found.items[0].reference) == ("gsm8k_0", "2280")
    assert "incredibly smart" not in found.items[0].prompt
    # Each row's own solution, which ends with #### and the result, is judged right.
    solutions = load_problems("asset:gsm8k_100", judge, prompt="{chain_of_thought}", answer="target_answer")
    verdicts = [judge.compare(problem.reference, final_part(problem.prompt)) for problem in solutions.items]
    assert all(verdict.right for verdict in verdicts)


def test_a_model_is_asked_and_judged(parrot, judge, tmp_path):
    """The model repeats the prompt's last character once."""
    rows = [
        {"question": "x = 7", "answer": "7", "kind": "copy"},
        {"question": "x = 7", "answer": "8", "kind": "copy"},
        {"question": "x = y", "answer": "9"},
    ]
    problems = load_problems(write(tmp_path / "p.jsonl", *rows), judge, prompt="{question}", answer="answer")
    result = math_problems(parrot, problems, judge, CompletionOptions(max_new_tokens=1, render="text"))
    assert [(row["answer"], row["extracted"], row["right"]) for row in result.rows] == [
        ("7", "7", True),
        ("7", "7", False),
        ("y", None, False),
    ]
    assert result.metrics["accuracy"].value == pytest.approx(1 / 3)
    assert result.by_type == {"copy": {"count": 2, "right": 1}}
    assert result.counts == {"rows": 3, "skipped_rows": 0, "no_result": 1, "errors": 0, "unfinished": 3}
