"""Every format of preference rows as the one internal form, and what is refused."""

from __future__ import annotations

import math

import pytest

from posttrain_jax.data.formats import Conversation, to_conversation
from posttrain_jax.data.preferences import Comparison, to_preference
from posttrain_jax.data.rows import RowError

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
    row = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD], "system": "Be kind."}
    assert to_preference(row).completions == (chat(SYSTEM, USER, GOOD), chat(SYSTEM, USER, BAD))
    with pytest.raises(RowError, match="system: is another system prompt"):
        to_preference({**row, "system": "Be brief."})


WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
SAID = {"chosen": "Hello!", "rejected": "No."}
RANKED = {"completions": ["Hello!", "No."], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"question": "Hi?"}, "Hi?"),
        ({"context": "Hi?"}, "Hi?"),
        ({"instruction": "Do", "input": "this"}, "Do\nthis"),
        ({"instruction": "Do", "input": None}, "Do"),
        ({"context": "Here", "question": "what?"}, "Here\nwhat?"),
        ({"query": "Hi?", "prompt": None}, "Hi?"),
        ({"context": [{"role": "user", "content": "Hi?"}]}, "Hi?"),
    ],
)
@pytest.mark.parametrize(
    "answers", [SAID, RANKED, {"completion": "Hello!", "label": True}, {"completion": "Hello!", "rating": 2}]
)
def test_columns_that_make_up_the_prompt_are_read(columns, prompt, answers):
    for row in ({**columns, **answers}, {**answers, **columns, "system": "Be kind."}):
        first = to_preference(row).completions[0]
        assert first.messages[-2:] == ({"role": "user", "content": prompt}, GOOD)
        assert (first.messages[0] == SYSTEM) == ("system" in row)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "prompt", [{"prompt": "Hi?"}, {"prompt": [USER]}, {"question": "Hi?"}, {"messages": [USER]}]
)
def test_a_chat_on_one_side_only_does_not_double_the_prompt(side, prompt):
    preference = to_preference({**prompt, **SAID, side: WHOLE[side]})
    assert preference.completions == (chat(USER, GOOD), chat(USER, BAD)) and preference.repeated


@pytest.mark.parametrize(
    ("row", "completions"),
    [
        (
            {"prompt": "Hi?", "chosen": "Hi? Hello!", "rejected": "Hi? No."},
            [("Hi?", " Hello!"), ("Hi?", " No.")],
        ),
        (
            {"prompt": "The sky is", "completions": ["The sky is blue", "The sky is up"], "ranks": [1, 2]},
            [("The sky is", " blue"), ("The sky is", " up")],
        ),
        ({"prompt": "The sky is", "completion": "The sky is blue", "label": True}, [("The sky is", " blue")]),
        (
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant:",
                "chosen": "\n\nHuman: Hi\n\nAssistant: A",
                "rejected": "\n\nHuman: Hi\n\nAssistant: B",
            },
            [("\n\nHuman: Hi\n\nAssistant:", " A"), ("\n\nHuman: Hi\n\nAssistant:", " B")],
        ),
        (
            {
                "prompt": "Hi",
                "chosen": "\n\nHuman: Hi\n\nAssistant: A",
                "rejected": "\n\nHuman: Hi\n\nAssistant: B",
            },
            [("\n\nHuman: Hi\n\nAssistant:", " A"), ("\n\nHuman: Hi\n\nAssistant:", " B")],
        ),
    ],
)
def test_texts_that_repeat_the_prompt_do_not_double_it(row, completions):
    assert [(c.prompt, c.completion) for c in to_preference(row).completions] == completions


def test_texts_that_repeat_a_question_do_not_double_it():
    row = {"question": "Hi?", "chosen": "Hi? Hello!", "rejected": "Hi? No."}
    assert to_preference(row).completions == (chat(USER, GOOD), chat(USER, BAD))


def test_completions_that_are_whole_chats():
    ranked = to_preference(
        {"completions": [[USER, BAD], [USER, GOOD], [USER, {**GOOD, "content": "?"}]], "ranks": [2, 1, 2]}
    )
    assert ranked.completions[:2] == (chat(USER, BAD), chat(USER, GOOD))
    assert ranked.ranks == (1, 0, 1)


def test_an_answer_that_takes_up_its_question_is_left_as_it_is():
    row = {"question": "Is it so?", "chosen": "Is it so? Yes.", "rejected": "No."}
    assert to_preference(row).completions[0].messages[-1]["content"] == "Is it so? Yes."


def test_text_rows_as_chats():
    row = {"prompt": "Hi?", **SAID, "system": "Be kind."}
    assert to_preference(row, text_as="chat").completions == (
        chat(SYSTEM, USER, GOOD),
        chat(SYSTEM, USER, BAD),
    )


@pytest.mark.parametrize("off", [{"train": False}, {"weight": 0}])
def test_flags_of_turns_are_those_of_sft(off):
    turns = [{**GOOD, **off}, {"role": "user", "content": "So?"}]
    row = {"prompt": [USER], "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    assert to_preference(row).completions[0].trained == (False, False, False, True)
    with pytest.raises(RowError, match="chosen: gives every assistant turn weight 0"):
        to_preference({"prompt": [USER], "chosen": [{**GOOD, **off}], "rejected": [BAD]})


def test_a_score_of_one_side_is_no_margin():
    assert to_preference({"prompt": "x", **SAID, "chosen_score": 2}).unused == ("chosen_score",)


def test_columns_that_are_not_used_are_named():
    row = {"prompt": "Hi?", **WHOLE, "prompt_id": "x", "messages": [USER, GOOD], "source": "s", "label": "a"}
    assert to_preference(row).unused == ("prompt", "prompt_id", "messages", "source", "label")


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
def test_a_labeled_completion(row):
    preference = to_preference(row)
    assert preference.completions == (chat(USER, GOOD),)
    assert preference.label is True


@pytest.mark.parametrize(
    ("extra", "comparison"),
    [
        ({"margin": 0.5}, Comparison(0, 1, margin=0.5)),
        ({"margin": "-.5", "weight": " 2 "}, Comparison(0, 1, margin=-0.5, weight=2.0)),
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
        ({**PAIR, "margin": "1e99"}, "margin", "not a finite number"),
        ({**PAIR, "weight": "nan"}, "weight", "not a finite number"),
        ({**PAIR, "weight": "1_0"}, "weight", "not a finite number"),
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
        ({"prompt": "x", "completion": "a", "label": "2"}, "label", "not a boolean"),
        ({"prompt": "x", "completion": "a", "label": "good"}, "label", "not a boolean"),
        ({"messages": [USER], "label": True}, "messages", "must end with the assistant's turn"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": 1}, "system", "not text"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "tools": "[{"}, "tools", "should hold JSON"),
        ({"text": "x"}, "(row)", "a preference needs"),
        ({**PAIR, "system": "Be kind."}, "system", "data.text_as=chat"),
        ({**PAIR, "input": "y"}, "input", "could be part of the prompt"),
        ({**WHOLE, "prompt": "Another?"}, "prompt", "could be part of the prompt"),
        ({**WHOLE, "instruction": "Be kind"}, "instruction", "could be part of the prompt"),
        ({"prompt": "Another?", **SAID, "chosen": [USER, GOOD]}, "chosen", "another prompt than the row's"),
        ({"messages": [USER, GOOD], **SAID}, "chosen", "repeats the last turn"),
        (
            {"prompt": "The sky is", "chosen": "The sky is blue", "rejected": "up"},
            "chosen",
            "without their prompt",
        ),
        (RANKED, "prompt", "is missing"),
        ({**SAID, "headline": "Hi?"}, "headline", "could be part of the prompt"),
        ({**RANKED, "question": None}, "question", "is null"),
        ({**PAIR, "margin": 10**400}, "margin", "not a finite number"),
        ({**PAIR, "margin": 1e300}, "margin", "not a finite number"),
        ({"prompt": "x", "completion": "a", "rating": 10**400}, "rating", "not a finite number"),
        (
            {"prompt": "x", "completions": ["a", "b"], "ranks": [1, 10**400]},
            "ranks[1]",
            "not a finite number",
        ),
        ({"conversations": [{"from": {}, "value": "q"}], **SAID}, "conversations[0].from", "known speakers"),
        ({**PAIR, "subset": ["a"]}, "subset", "not the name"),
    ],
)
def test_what_is_refused(row, column, reason):
    with pytest.raises(RowError) as error:
        to_preference(row)
    assert error.value.column == column
    assert reason in error.value.reason
