"""Answers come in the order of the questions, end before stop strings, and name the question that does not fit."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from posttrain_jax.core.errors import InputError
from posttrain_jax.evaluate.completions import CompletionOptions, complete_all
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.rewards.thoughts import after_thought, answer_text, prompt_opens_thought


def test_answers_are_in_order_whatever_the_batch(loaded):
    questions = ["one", "a much longer question than the others", "2", "three?"]
    names = [f"q{n}" for n in range(4)]
    wide, narrow = (
        complete_all(loaded, questions, names, CompletionOptions(max_new_tokens=5, batch_rows=rows))
        for rows in (4, 1)
    )
    assert wide == narrow
    assert all(
        len(completion.token_ids) <= 5 and completion.finish_reason in ("stop", "length")
        for completion in wide
    )


def test_an_answer_ends_before_its_stop_string(parrot):
    """The model repeats "x"; "xx" is complete after the second one."""
    (completion,) = complete_all(
        parrot, ["x"], ["q"], CompletionOptions(max_new_tokens=6, render="text", stop=("xx",))
    )
    assert (completion.text, len(completion.token_ids), completion.finish_reason) == ("", 2, "stop")
    (completion,) = complete_all(parrot, ["x"], ["q"], CompletionOptions(max_new_tokens=6, render="text"))
    assert (completion.text, completion.finish_reason) == ("xxxxxx", "length")


@pytest.mark.parametrize(
    ("options", "questions", "words"),
    [
        ({}, ["fits", "w" * 200], "rows.jsonl:2 has .* leaves no room"),
        ({"render": "html"}, ["a", "b"], "data.render is 'html'; use one of auto, chat, text"),
        ({"batch_rows": 0}, ["a", "b"], "batch_size is 0"),
        ({"temperature": -1.0}, ["a", "b"], "temperature is -1"),
    ],
)
def test_what_cannot_be_answered_is_refused(loaded, options, questions, words):
    names = ["rows.jsonl:1", "rows.jsonl:2"]
    with pytest.raises(InputError, match=words):
        complete_all(loaded, questions, names, CompletionOptions(max_new_tokens=4, **options))


def test_thinking_is_left_out():
    assert after_thought("<think>\nso\n</think>\n\nYes") == "Yes"
    assert after_thought("so\n</think>Yes") == "Yes"  # the template has written <think> already
    assert after_thought(" <think> so") is None
    assert after_thought("I think so") == "I think so"
    assert after_thought("I think so", in_thought=True) is None
    assert after_thought("so</think>Yes", in_thought=True) == "Yes"
    assert after_thought("<think>a</think>Yes, <think>but") is None
    assert after_thought("It writes `<think>` first.") == "It writes `<think>` first."


def test_whether_a_prompt_opens_a_thought_is_told_by_its_tokens(parrot):
    opened = {
        "<|im_start|>assistant\n<think>\n": True,
        "Q: x\nA: <think>": True,
        "Think inside <think> tags.": False,
        "<think>\n\n</think>\n\n": False,
    }
    tokenizer = parrot.tokenizer
    assert {p: prompt_opens_thought(tokenizer, tokenizer(p)["input_ids"]) for p in opened} == opened
    options = CompletionOptions(max_new_tokens=3, render="text")
    unfinished, plain = complete_all(parrot, ["Q: x\nA: <think>", "x <think> x"], ["a", "b"], options)
    assert unfinished.text and unfinished.after_thought() is None
    assert plain.after_thought() == plain.text == "xxx"


def test_marks_of_a_thought_that_are_special_tokens_are_in_the_text():
    """Other special tokens are not; a stop string is counted in the text without any."""
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a<think>b</think>c<|im_end|>")["input_ids"]
    assert answer_text(tokenizer, tokens) == "a<think>b</think>c"
    tokenizer.add_tokens(
        [AddedToken(mark, special=True) for mark in ("<think>", "</think>")], special_tokens=True
    )
    tokens = tokenizer("a<think>b</think>cSTOP<|im_end|>")["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "abcSTOP"
    assert answer_text(tokenizer, tokens) == "a<think>b</think>cSTOP"
    assert answer_text(tokenizer, tokens, stop_at=3) == "a<think>b</think>c"
    assert prompt_opens_thought(tokenizer, tokenizer("Hi<think>\n")["input_ids"])
