"""launch.win_rate: what is read of the two files, and what is refused of files and flags."""

from __future__ import annotations

import dataclasses

import pytest
from generated import answers, options, read, two_files, write
from tiny_model import launch

from launch.win_rate import compare, read_pairs
from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards import judge


@pytest.fixture
def files(tmp_path):
    return two_files(tmp_path)


def test_the_judge_sees_no_thoughts(tmp_path, capsys):
    chat = [{"role": "user", "content": "Hi"}]
    thoughts = ["<think>a</think>one", "so</think>two", "<think>so", "so", "so", "three"]
    a = answers(tmp_path, "a.jsonl", thoughts, messages=chat, prompt=None)
    b = answers(tmp_path, "b.jsonl", ["x"] * 5 + ["<think>so"], messages=chat, prompt=None)
    rows = [{**row, "in_thought": True} if row["id"] in (1, 3) else row for row in read(a)]
    write(a, rows)
    pairs = read_pairs(options(tmp_path, "x", a=a, b=b))
    assert [pair.a for pair in pairs] == ["one", "two", "", "", "so", "three"]
    assert [pair.b for pair in pairs] == ["x"] * 5 + [""]
    assert "so" not in judge.questions_of(pairs[2])[0].text.split("===== request")[1]
    write(a, [{**rows[0], "in_thought": "yes"}])
    with pytest.raises(InputError, match=r"a\.jsonl:1: in_thought must be true or false"):
        read_pairs(options(tmp_path, "x", a=a, b=b))
    # A plain prompt says it itself.
    texts = [{"id": 0, "text": "so", "prompt": "Hi <think>\n"}]
    plain = write(tmp_path / "plain.jsonl", texts)
    (pair,) = read_pairs(options(tmp_path, "x", a=plain, b=plain))
    assert pair.a == pair.b == ""


def test_messages_may_have_the_keys_of_sharegpt(tmp_path):
    chat = [{"from": "human", "value": "How?"}]
    file = answers(tmp_path, "a.jsonl", ["so"] * 6, messages=chat, prompt=None)
    pairs = read_pairs(options(tmp_path, "x", a=file, b=file))
    assert all("How?" in pair.request for pair in pairs)
    rows = read(file)
    write(file, [{**rows[0], "messages": [{"from": "nobody", "value": "How?"}]}])
    with pytest.raises(InputError, match=r"a\.jsonl:1: messages\[0\]"):
        read_pairs(options(tmp_path, "x", a=file, b=file))


GOOD = {"id": 1, "sample": 0, "text": "t", "prompt": "p"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{**GOOD, "id": 2}],
            r"a\.jsonl:1: id 1, sample 0 is not in --b, like 1 of the 1 completions of --a",
        ),
        ([GOOD, {**GOOD, "sample": 1}], r"b\.jsonl:2: id 1, sample 1 is not in --a, like 1 of the 2"),
        ([{**GOOD, "prompt": "q"}], r"b\.jsonl:1: id 1 is of another prompt than .*a\.jsonl:1 is"),
        ([GOOD, GOOD], r"b\.jsonl:2: id is 1 with sample 0, which .*b\.jsonl:1 has already"),
        ([{**GOOD, "text": None}], r"b\.jsonl:1: text is missing"),
        ([{**GOOD, "id": None}], r"b\.jsonl:1: id is missing"),
        ([{**GOOD, "sample": "x"}], r"b\.jsonl:1: sample must be a whole number"),
        ([{"id": 1, "text": "t"}], r"b\.jsonl: its rows have no column prompt or messages"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, rows, words):
    a, b = write(tmp_path / "a.jsonl", [GOOD]), write(tmp_path / "b.jsonl", rows)
    with pytest.raises(InputError, match=words):
        compare(options(tmp_path, "http://127.0.0.1:9/v1", a=a, b=b, judge_model="j"))
    assert not (tmp_path / "out").exists()


def test_prompts_that_no_judge_can_read_are_refused(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"id": 0, "text": "t"}, {"id": 1, "text": "t"}])
    prompts = write(tmp_path / "p.jsonl", [{"id": 0, "prompt": "p"}, {"id": 1, "prompt_ids": [3]}])
    asked = options(tmp_path, "x", a=a, b=a, prompts=str(prompts))
    with pytest.raises(InputError, match=r"a\.jsonl:2: the row is of .*p\.jsonl:2, which has no text"):
        read_pairs(asked)
    write(prompts, [{"id": 0, "prompt": "p"}])
    with pytest.raises(InputError, match=r"a\.jsonl:2: id is 1, which no prompt has"):
        read_pairs(asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"judge": "https://h/v1"}, "so --judge_model is needed"),
        ({"judge": "no/such/thing", "judge_model": "m"}, "--judge_model is for a judge behind a URL"),
        ({"judge": "no/such/thing"}, "no such file or folder"),
        ({"resamples": 0}, "--resamples is 0"),
        ({"seed": -1}, "--seed is -1; it must be 0 or more"),
        ({"a": "missing.jsonl"}, "missing.jsonl: there is no such file"),
        ({"judge": "http://h", "judge_model": "m", "parallel": 0}, r"parallel \(0\)"),
    ],
)
def test_bad_flags_are_one_sentence(files, tmp_path, change, words):
    good = options(tmp_path, "x", a=files[0], b=files[1])
    with pytest.raises(InputError, match=words):
        compare(dataclasses.replace(good, **change))


def test_flags_that_are_missing_exit_with_2():
    done = launch("win_rate", "--a=a.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: --a, --b, --judge and --out are needed; an example: python -m launch.win_rate"
    )
