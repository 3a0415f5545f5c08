"""Every format of preference rows as the one internal form, and what is refused."""

from __future__ import annotations

import math

import pytest

from posttrain_jax.data.formats import Conversation, to_conversation
from posttrain_jax.data.preferences import Comparison, to_preference
from posttrain_jax.data.sources import RowError

USER = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "No."}


def chat(*messages: dict[str, str]) -> Conversation:
    """Only the last message is trained."""
    trained = tuple(i == len(messages) - 1 for i in range(len(messages)))
    return Conversation(messages=messages, trained=trained)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "Hello!", "rejected": "No."},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt_id": "x"},
        {"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
)
def test_a_pair_in_every_format(row):
    preference = to_preference(row)
    assert preference.completions == (chat(USER, GOOD), chat(USER, BAD))
    assert preference.comparisons == (Comparison(0, 1),)


def test_an_assistant_turn_of_the_prompt_is_not_trained():
    preference = to_preference({"prompt": [USER, GOOD, USER], "chosen": [GOOD], "rejected": [BAD]})
    assert preference.completions[0].trained == (False, False, False, True)


SYSTEM = {"role": "system", "content": "Be kind."}
CHATS = [
    {
        "conversations": [{"from": "human", "value": "Hi?"}],
        "chosen": {"from": "gpt", "value": "Hello!"},
        "rejected": {"from": "gpt", "value": "No."},
    },
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "completions": ["Hello!", "No."], "ranks": [1, 2]},
    {"prompt": [USER], "completion": [GOOD], "label": True},
    {"messages": [USER, GOOD], "label": True},
    {
        "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello!"}],
        "label": True,
    },
]


@pytest.mark.parametrize("row", CHATS)
def test_every_chat_keeps_its_system_prompt(row):
    for completion in to_preference({**row, "system": "Be kind."}).completions:
        assert completion.messages[:2] == (SYSTEM, USER)
        assert completion.trained == (False, False, True)


def test_a_chat_with_a_system_prompt_takes_no_second_one():
    row = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD], "system": "Be brief."}
    assert to_preference(row).completions == (chat(SYSTEM, USER, GOOD), chat(SYSTEM, USER, BAD))


@pytest.mark.parametrize("row", CHATS)
@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'])
def test_tools_are_read_as_those_of_sft(row, tools):
    sft = to_conversation({"messages": [USER, GOOD], "tools": tools}).tools
    assert sft == [{"type": "function", "function": {"name": "add"}}]
    assert [c.tools for c in to_preference({**row, "tools": tools}).completions] in ([sft], [sft, sft])


def test_texts_of_one_prompt_follow_it():
    preference = to_preference({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})
    assert [(c.prompt, c.completion) for c in preference.completions] == [
        ("1 + 1 =", " 2"),
        ("1 + 1 =", " 3"),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (
            "\n\nHuman: Hi\n\nAssistant: Hello",
            "\n\nHuman: Hi\n\nAssistant: Hey",
            "\n\nHuman: Hi\n\nAssistant:",
        ),
        ("The sky is blue", "The sky is black", "The sky is"),
    ],
)
def test_the_prompt_of_two_texts_is_what_they_begin_with(chosen, rejected, prompt):
    preference = to_preference({"chosen": chosen, "rejected": rejected})
    assert {c.prompt for c in preference.completions} == {prompt}
    assert [f"{c.prompt}{c.completion}" for c in preference.completions] == [chosen, rejected]


def test_ranks_become_every_pair_that_is_no_tie():
    """Ranks 2, 1, 1: the second and third beat the first and tie."""
    preference = to_preference({"prompt": "x", "completions": ["a", "b", "c"], "ranks": [2, 1, 1]})
    assert preference.comparisons == (Comparison(1, 0), Comparison(2, 0))
    assert preference.ties == 1


def test_scores_become_pairs_with_margins():
    preference = to_preference({"prompt": "x", "completions": ["a", "b"], "scores": [0.5, 2]})
    assert preference.comparisons == (Comparison(1, 0, margin=1.5),)
    assert preference.ratings == (0.5, 2.0)


def test_equal_ratings_are_ratings_without_a_comparison():
    """For a regression; a loss over comparisons has nothing to learn from such a row."""
    for ratings in ({"scores": [2, 2]}, {"ratings": [{"r": 2}, {"s": 2}]}):
        preference = to_preference({"prompt": "x", "completions": ["a", "b"], **ratings})
        assert (preference.ratings, preference.comparisons, preference.ties) == ((2.0, 2.0), (), 1)


def test_ratings_by_rater_keep_the_raters():
    """Means: a (1 + 3) / 2 = 2, b 4 (rater s did not rate it)."""
    row = {"prompt": "x", "completions": ["a", "b"], "ratings": [{"r": 1, "s": 3}, {"r": 4}]}
    preference = to_preference(row)
    assert preference.ratings == (2.0, 4.0)
    assert preference.raters["r"] == (1.0, 4.0)
    assert preference.raters["s"][0] == 3.0 and math.isnan(preference.raters["s"][1])


def test_one_rated_completion():
    preference = to_preference({"prompt": "x", "completion": "a", "ratings": {"r": 1, "s": 2}})
    assert preference.ratings == (1.5,)
    assert preference.comparisons == ()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"messages": [USER, GOOD], "label": 1},
        {"messages": [USER], "completion": [GOOD], "label": True},
    ],
)
def test_a_labelled_completion(row):
    preference = to_preference(row)
    assert preference.completions == (chat(USER, GOOD),)
    assert preference.label is True


@pytest.mark.parametrize(
    ("extra", "comparison"),
    [
        ({"margin": 0.5}, Comparison(0, 1, margin=0.5)),
        ({"margin": "Significantly better"}, Comparison(0, 1, margin=1.0)),
        ({"score_chosen": 8.5, "score_rejected": 6}, Comparison(0, 1, margin=2.5)),
        ({"chosen_score": 1, "rejected_score": -1}, Comparison(0, 1, margin=2.0)),
        ({"probability": 0.75, "weight": 2}, Comparison(0, 1, weight=2.0, probability=0.75)),
        ({"probability": 0.25, "margin": 1}, Comparison(1, 0, margin=-1.0, probability=0.75)),
    ],
)
def test_what_a_pair_says_beside_its_order(extra, comparison):
    assert to_preference({"prompt": "x", "chosen": "a", "rejected": "b", **extra}).comparisons == (
        comparison,
    )


PAIR = {"prompt": "x", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "column", "reason"),
    [
        ({**PAIR, "rejected": "a"}, "rejected", "the same as chosen"),
        ({**PAIR, "chosen": ""}, "chosen", "is empty"),
        ({**PAIR, "rejected": None}, "rejected", "is null"),
        ({"prompt": "x", "chosen": "a"}, "rejected", "is missing"),
        ({**PAIR, "prompt": None}, "prompt", "is null"),
        ({**PAIR, "margin": "huge"}, "margin", "use a number or one of"),
        ({**PAIR, "margin": math.nan}, "margin", "not a finite number"),
        ({**PAIR, "probability": 1.5}, "probability", "between 0 and 1"),
        ({**PAIR, "weight": -1}, "weight", "between 0 and"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Bye?"}, BAD]}, "rejected", "same prompt"),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, {**USER, "content": "?"}, BAD]},
            "chosen",
            "another prompt",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected", "no completion of its own"),
        ({"prompt": "x", "completions": ["a"], "ranks": [1]}, "completions", "at least two"),
        ({"prompt": "x", "completions": ["a", "b"]}, "ranks", "is missing"),
        ({"prompt": "x", "completions": ["a", "b"], "ranks": [1]}, "ranks", "one for each completion"),
        ({"prompt": "x", "completions": ["a", "b"], "ranks": [1, 1]}, "completions", "all tied"),
        (
            {"prompt": "x", "completions": ["a", "b"], "ratings": [[1, 2], [3, 4]]},
            "ratings[0]",
            "without rater ids",
        ),
        ({"prompt": "x", "completion": "a", "ratings": [1, 2]}, "ratings", "without rater ids"),
        ({"prompt": "x", "completion": "a", "label": "good"}, "label", "not a boolean"),
        ({"messages": [USER], "label": True}, "messages", "must end with the assistant's turn"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": 1}, "system", "not text"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "tools": "[{"}, "tools", "should hold JSON"),
        ({"text": "x"}, "(row)", "a preference needs"),
    ],
)
def test_what_is_refused(row, column, reason):
    with pytest.raises(RowError) as error:
        to_preference(row)
    assert error.value.column == column
    assert reason in error.value.reason
