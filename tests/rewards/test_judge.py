"""What a judge is asked, what its words mean, what is kept on disk, and a model of ours as the judge."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys

import jax
import numpy as np
import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.rewards.judge import (
    Cache,
    Judgment,
    Pair,
    Question,
    Reply,
    Usage,
    cache_key,
    judge_pairs,
    parse_verdict,
    preferences_of_scores,
    questions_of,
    request_text,
)
from posttrain_jax.rewards.judge_endpoint import Endpoint, EndpointJudge
from posttrain_jax.rewards.judge_model import ModelJudge, second_preferred


class LengthJudge:
    """Prefers the longer answer, says nothing readable of two equal ones, and gives up after `patience` questions."""

    def __init__(self, patience=1000, name="length"):
        self.name = name
        self.patience = patience
        self.asked = 0

    def ask(self, questions):
        for number, question in reversed(list(enumerate(questions))):
            if self.asked == self.patience:
                raise InputError("the judge has gone home")
            self.asked += 1
            first, second = (
                question.text.split(f"===== answer {letter} =====\n")[1].split("\n=====")[0]
                for letter in "AB"
            )
            text = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "Well, both."
            yield number, Reply(parse_verdict(text), text, 10, 1)


def pair(number, a, b):
    return Pair(number, 0, f"a.jsonl:{number}", f"request {number}", a, b)


PAIRS = [pair(0, "long answer", "short"), pair(1, "x", "xyz"), pair(2, "one", "two"), pair(3, "same", "same")]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 0.0),
        ("B", 1.0),
        ("tie", 0.5),
        ("Tie.", 0.5),
        ("b\n", 1.0),
        (" **A** ", 0.0),
        ("[[B]]", 1.0),
        ('"A".', 0.0),
        ("", None),
        ("A or B", None),
        ("AB", None),
        ("Answer A", None),
        ("A because it is right", None),
        ("tied", None),
        ("C", None),
    ],
)
def test_only_one_word_is_a_verdict(text, verdict):
    assert parse_verdict(text) == verdict


def test_a_question_holds_request_and_answers_in_either_order():
    a_first, b_first = questions_of(Pair("p", 0, "here", "{braces}?", "of {a}", "of B"))
    for question, first, second in ((a_first, "of {a}", "of B"), (b_first, "of B", "of {a}")):
        assert (
            f"=====\n{{braces}}?\n===== answer A =====\n{first}\n===== answer B =====\n{second}\n"
            in question.text
        )
        assert question.where == "here"


def test_what_a_row_of_prompts_asks():
    assert request_text({"prompt": "Why?"}) == "Why?"
    assert request_text({"messages": [{"role": "user", "content": "Why?"}]}) == "Why?"
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert request_text({"messages": messages}) == (
        "[system]\nBe kind.\n\n[user]\nHi\n\n[assistant]\nHello\n\n[user]\nWhy?"
    )
    assert request_text({"prompt_ids": [1, 2]}) is None


def test_both_orders_are_asked_and_what_cannot_be_read_is_a_tie(tmp_path):
    """Pair 3's answers are equal, so both orders are one question: 7 calls for 8 places."""
    judge = LengthJudge()
    judged = judge_pairs(judge, PAIRS, Cache(tmp_path / "cache.jsonl"))
    assert judged.judgments == [
        Judgment(0, 0.0, 0.0, 11, 5),
        Judgment(1, 1.0, 1.0, 1, 3),
        Judgment(2, 0.5, 0.5, 3, 3, unparsed=2),
        Judgment(3, 0.5, 0.5, 4, 4, unparsed=2),
    ]
    assert judged.replies == [("A", "B"), ("B", "A"), ("Well, both.",) * 2, ("Well, both.",) * 2]
    assert judged.usage == Usage(calls=7, cache_hits=1, prompt_tokens=70, completion_tokens=7)
    assert judged.usage.cost(price_prompt=2.0, price_completion=10.0) == pytest.approx(
        (70 * 2 + 7 * 10) / 1e6
    )


def test_what_was_judged_before_a_failure_is_not_asked_again(tmp_path):
    path = tmp_path / "new" / "cache.jsonl"
    with pytest.raises(InputError, match="gone home"):
        judge_pairs(LengthJudge(patience=4), PAIRS, Cache(path))
    assert len(Cache(path)) == 4
    shown = []
    judge = LengthJudge()
    again = judge_pairs(judge, PAIRS, Cache(path), progress=lambda done, total: shown.append((done, total)))
    # 8 places, of which 4 replies fill 5: the equal answers of pair 3 are one of them.
    assert (again.usage.calls, again.usage.cache_hits, judge.asked) == (3, 5, 3)
    assert shown == [(6, 8), (7, 8), (8, 8)]
    whole = judge_pairs(LengthJudge(), PAIRS, Cache(tmp_path / "other.jsonl"))
    assert (again.judgments, again.replies) == (whole.judgments, whole.replies)
    nothing = LengthJudge(patience=0)
    assert judge_pairs(nothing, PAIRS, Cache(path)).judgments == whole.judgments
    # Another judge, and another answer, are other questions.
    assert judge_pairs(LengthJudge(name="other"), PAIRS, Cache(path)).usage.calls == 7
    assert judge_pairs(LengthJudge(), [pair(0, "long answer", "shorts")], Cache(path)).usage.calls == 2


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "cache.jsonl"
    judge_pairs(LengthJudge(), PAIRS, Cache(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(Cache(path)) == 6
    assert judge_pairs(LengthJudge(), PAIRS, Cache(path)).usage.calls == 1
    assert path.read_bytes() == whole
    for damage in (b"{}\n", b"[1]\n", b"nonsense\n", b'{"key": "k", "second": 3}\n'):
        path.write_bytes(damage + whole)
        with pytest.raises(InputError, match=r"cache\.jsonl:1 is not a reply of a judge"):
            Cache(path)
    with pytest.raises(InputError, match="cannot be used"):
        Cache(path / "below-a-file.jsonl")


def test_text_of_any_kind_survives_the_cache(tmp_path):
    path = tmp_path / "cache.jsonl"
    reply = Reply(None, "line\u2028break \ud800 Grüße\r\n", 3, 4)
    Cache(path).put("k", reply)
    assert Cache(path).get("k") == reply


def test_scores_of_a_reward_model_become_preferences():
    """Higher, lower and equal; infinities compare as numbers do."""
    found = preferences_of_scores(
        np.asarray([0.0, 2.0, 1.5, np.inf, -np.inf]), np.asarray([1.0, -2.0, 1.5, np.inf, 0])
    )
    np.testing.assert_array_equal(found, [1.0, 0.0, 0.5, 0.5, 1.0])
    with pytest.raises(InputError, match="scores of pair 1 are 1 and nan"):
        preferences_of_scores(np.ones(2), np.asarray([0.0, np.nan]))
    with pytest.raises(InputError, match=r"shapes \(2,\) and \(3,\)"):
        preferences_of_scores(np.ones(2), np.ones(3))


@pytest.mark.parametrize("render", ["chat", "text"])
def test_a_model_judges_by_the_log_probabilities_of_the_letters(loaded, render):
    """Questions fit the model's 128 places only if they are short, so the judge is asked directly. One byte a letter:
    P(B) / (P(A) + P(B)) is the sigmoid of the difference of two logits of the whole forward pass."""
    judge = ModelJudge(loaded, render=render, batch_rows=2)
    texts = ["which?", "the other one? ", "A?"]
    replies = dict(judge.ask([Question(text, f"row {n}") for n, text in enumerate(texts)]))
    assert sorted(replies) == [0, 1, 2]
    for number, text in enumerate(texts):
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if render == "chat" else text
        prompt += "" if prompt[-1].isspace() else " "
        ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        logits = np.asarray(loaded.apply(loaded.params, np.asarray([ids], np.int32)).logits_BTV)[0, -1]
        a, b = (logits[loaded.tokenizer(letter)["input_ids"][0]] for letter in "AB")
        assert replies[number].second == pytest.approx(1 / (1 + math.exp(a - b)), abs=1e-4)
        assert replies[number].prompt_tokens == len(ids) + 1  # with the letter


def test_a_question_that_is_too_long_for_the_model_names_its_pair(loaded, tmp_path):
    with pytest.raises(
        InputError, match=r"a\.jsonl:0 has \d+ tokens with the choice 'A', more than the model's"
    ):
        judge_pairs(ModelJudge(loaded), PAIRS[:1], Cache(tmp_path / "cache.jsonl"))
    with pytest.raises(InputError, match="batch_rows is 0"):
        ModelJudge(loaded, batch_rows=0)


def test_the_names_of_judges_tell_them_apart(loaded):
    chat, text = ModelJudge(loaded, render="chat"), ModelJudge(loaded, render="text")
    assert chat.name != text.name
    question = Question("q", "here")
    assert cache_key(chat, question) != cache_key(text, question)
    assert cache_key(chat, question) == cache_key(ModelJudge(loaded), Question("q", "there"))
    retrained = jax.tree.map(lambda leaf: 1.01 * leaf, loaded.params)
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template += "Go on: "
    for change in ({"params": retrained}, {"tokenizer": tokenizer}):
        other = ModelJudge(dataclasses.replace(loaded, **change), render="chat")
        assert cache_key(other, question) != cache_key(chat, question)


def test_preferences_at_the_ends():
    assert second_preferred(-1e4, 0.0) == 1.0
    assert second_preferred(0.0, -1e4) == 0.0
    assert second_preferred(-3.0, -3.0) == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "localhost:8000"}, "must start with http"),
        ({"model": ""}, "needs the name"),
        ({"parallel": 0}, r"parallel \(0\)"),
        ({"retries": -1}, r"retries \(-1\)"),
        ({"timeout": 0.0}, r"timeout \(0\) positive"),
        ({"api_key": "ключ"}, "plain ASCII"),
    ],
)
def test_bad_endpoints_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        Endpoint(**{"url": "http://h/v1", "model": "m", **change})


def test_without_the_client_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"needs the package openai; run: pip install -e '\.\[judge\]'"):
        EndpointJudge(Endpoint("http://h/v1", "m"))
