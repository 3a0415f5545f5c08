"""Every row format becomes one Conversation, or a RowError with the column and the reason."""

from __future__ import annotations

import pytest

from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.rows import RowError, unused_text
from posttrain_jax.data.sources import read_rows

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("name", "rows", "turns"),
    [
        ("alpaca_en_demo", 999, 999),
        ("identity", 91, 91),
        ("v1_sft_demo", 500, 500),
        ("glaive_toolcall_en_demo", 300, 957),
        ("reason_tool_use_demo_50", 50, 112),
    ],
)
def test_real_files(name, rows, turns, demo_path):
    read = list(read_rows(str(demo_path(name))))
    assert len(read) == rows and not any(row.error for row in read)
    conversations = [to_conversation(row.value) for row in read]
    assert sum(sum(conversation.trained) for conversation in conversations) == turns


def test_real_texts(demo_path):
    for name in ("wiki_demo", "c4_demo"):
        for row in read_rows(str(demo_path(name))):
            assert to_conversation(row.value).text


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "history": []},
        {"messages": [USER, ASSISTANT], "prompt": "q", "text": "user: q\nassistant: a", "id": 7},
        {"messages": None, "text": None, "question": "q", "answer": "a"},
        {"instruction": "q", "response": "a", "category": "qa"},
        {"prompt": [USER], "completion": [USER, ASSISTANT]},
    ],
)
def test_the_same_chat_in_every_format(row):
    conversation = to_conversation(row)
    assert conversation.messages == (USER, ASSISTANT)
    assert conversation.trained == (False, True)
    assert conversation.tools is None and conversation.prompt is None and conversation.text is None


def test_alpaca_with_everything():
    row = {"instruction": "do", "input": "this", "output": "done", "system": "Be.", "history": [["q1", "a1"]]}
    conversation = to_conversation(row)
    assert [(message["role"], message["content"]) for message in conversation.messages] == [
        ("system", "Be."),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]
    assert conversation.trained == (False, False, True, False, True)


def test_sharegpt_with_tools():
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
    }
    conversation = to_conversation(row)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert conversation.messages[2] == {"role": "assistant", "tool_calls": [call]}
    assert conversation.messages[3] == {"role": "tool", "content": "r"}
    assert conversation.trained == (False, False, True, False, True)
    assert conversation.tools == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    ]


def test_openai_tool_calls_with_null_content():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"},
            ASSISTANT,
        ]
    }
    messages = to_conversation(row).messages
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert messages[1]["tool_calls"][0]["id"] == "c1" and "content" not in messages[1]
    assert messages[2] == {"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"}


def test_blocks_of_reasoning_and_calls():
    blocks = [
        {"type": "reasoning", "value": "think"},
        {"type": "text", "value": "say"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
    ]
    message = to_conversation({"messages": [USER, {"role": "assistant", "content": blocks}]}).messages[1]
    assert message["reasoning_content"] == "think" and message["content"] == "say"
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_text_rows():
    assert to_conversation({"text": "t"}).text == "t"
    conversation = to_conversation({"prompt": "p", "completion": "c"})
    assert (conversation.prompt, conversation.completion) == ("p", "c")


THE_CHAT = [("user", "ctx\nq"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"context": "ctx", "question": "q", "answer": "a"}, THE_CHAT),
        ({"instruction": "ctx", "context": "", "input": "q", "response": "a"}, THE_CHAT),
        ({"instruction": "ctx\nq", "question": "ctx\nq", "output": "a", "answer": "a"}, THE_CHAT),
        ({"system_prompt": "S", "question": "ctx\nq", "response": "a"}, [("system", "S"), *THE_CHAT]),
        (
            {"query": "ctx\nq", "response": "a", "history": [["x", "y"]]},
            [("user", "x"), ("assistant", "y"), *THE_CHAT],
        ),
        (
            {"messages": [USER, ASSISTANT], "system_prompt": "S"},
            [("system", "S"), ("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_columns_that_make_up_the_prompt_are_read(row, turns):
    messages = to_conversation(row).messages
    assert [(message["role"], message["content"]) for message in messages] == turns


def test_text_rows_as_chats():
    row = {"prompt": "q", "completion": "a", "system": "S", "tools": [{"name": "f"}]}
    conversation = to_conversation(row, text_as="chat")
    assert [m["content"] for m in conversation.messages] == ["S", "q", "a"] and conversation.tools
    assert conversation.trained == (False, False, True)
    with pytest.raises(RowError, match=r"system: has no place before plain text .*data\.text_as=chat"):
        to_conversation(row)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "p", "completion": "c", "context": "x"}, "context"),
        ({"prompt": "p", "completion": "c", "user_input": "x"}, "user_input"),
        ({"prompt": "p", "completion": "c", "inputText": ["x"]}, "inputText"),
        ({"text": "some words", "prompt": "other words"}, "prompt"),
        ({"text": "some words", "question": "q", "answer": "a"}, "question"),
        ({"messages": [USER, ASSISTANT], "prompt": "another"}, "prompt"),
        ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "images"),
        ({"instruction": "q", "output": "yes", "text": "what else there was: q"}, "text"),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "Question": "x",
            },
            "Question",
        ),
    ],
)
def test_a_column_that_could_be_part_of_the_prompt_is_refused(row, column):
    with pytest.raises(
        RowError, match=rf"could be part of the prompt.*data\.ignore_columns={column}"
    ) as error:
        to_conversation(row)
    assert error.value.column == column


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"text": "t", "title": "T", "id": 1, "url": None, "tags": []}, ("title", "id")),
        ({"messages": [USER, ASSISTANT], "prompt": "q", "prompt_id": "x"}, ("prompt", "prompt_id")),
        ({"messages": [{**USER, "time": 3}, {**ASSISTANT, "time": None}]}, ("messages[].time",)),
        (
            {"question": "q", "answer": "a", "response": "b", "question_type": "x", "input_ids": [1]},
            ("answer", "question_type", "input_ids"),
        ),
        ({"text": "t", "prompt_labelling": "y"}, ("prompt_labelling",)),
        ({"text": "one two", "prompt": "one "}, ("prompt",)),
        ({"instruction": "i", "input": "j", "output": "o", "text": "Do: i\nWith: j\nIs: o"}, ("text",)),
    ],
)
def test_columns_that_are_not_used_are_named(row, unused):
    assert to_conversation(row).unused == unused


def test_unused_columns_in_words():
    assert unused_text({"id": 12000, "source": 12000, "note": 1}) == "id, source (12,000 rows); note (1 row)"
    assert unused_text({f"c{i}": 1 for i in range(15)}).endswith("c11 (1 row) and 3 more")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_under_any_name(key):
    message = to_conversation({"messages": [USER, {**ASSISTANT, key: "hm"}]}).messages[1]
    assert message == {**ASSISTANT, "reasoning_content": "hm"}
    block = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]
    message = to_conversation({"messages": [USER, {**ASSISTANT, key: "hm", "content": block}]}).messages[1]
    assert message == {**ASSISTANT, "reasoning_content": "hm"}


def test_the_older_function_call():
    call = {"name": "f", "arguments": '{"x": 1}'}
    row = chat(
        USER,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "r"},
        ASSISTANT,
    )
    messages = to_conversation({**row, "functions": [{"name": "f"}]}).messages
    assert messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert messages[2] == {"role": "tool", "content": "r", "name": "f"}
    assert to_conversation({**row, "functions": [{"name": "f"}]}).tools


@pytest.mark.parametrize("off", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}, {"training": 0}])
def test_a_turn_that_is_not_to_be_trained(off):
    row = {"messages": [USER, {**ASSISTANT, **off}, USER, {**ASSISTANT, "train": True, "weight": 1}]}
    assert to_conversation(row).trained == (False, False, False, True)
    human, gpt = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    row = {"conversations": [human, {**gpt, **off}, human, gpt]}
    assert to_conversation(row).trained == (False, False, False, True)


def test_a_completion_that_repeats_its_prompt():
    conversation = to_conversation({"prompt": "The sky is", "completion": "The sky is blue."})
    assert (conversation.prompt, conversation.completion) == ("The sky is", " blue.")
    assert conversation.repeated
    for prompt, completion in (
        ("Hello", "Hello there"),
        ("The sky is", "The sky isn't"),
        ("1 + 1 =", "1 + 1 ="),
    ):
        conversation = to_conversation({"prompt": prompt, "completion": completion})
        assert conversation.completion == completion and not conversation.repeated


def chat(*messages: object) -> dict:
    return {"messages": list(messages)}


def talk(*turns: object) -> dict:
    return {"conversations": list(turns)}


HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
BAD = [
    # null and missing
    ({"messages": None}, "messages", "is null"),
    ({"conversations": None}, "conversations", "is null"),
    ({"text": None}, "text", "is null"),
    ({"prompt": None, "completion": "a"}, "prompt", "is null"),
    ({"prompt": "a", "completion": None}, "completion", "is null"),
    ({"prompt": "a"}, "completion", "is missing"),
    ({"instruction": "a"}, "output", "is missing"),
    ({"instruction": None, "output": "a"}, "instruction", "is null"),
    ({"instruction": "a", "output": None}, "output", "is null"),
    ({}, "(row)", "has columns none"),
    ({"premise": "a", "answer": "b"}, "(row)", "has columns premise, answer"),
    (chat(USER, {"role": "assistant", "content": None}), "messages[1].content", "is null"),
    (chat({"role": "user"}, ASSISTANT), "messages[0].content", "is missing"),
    (chat({"content": "q"}, ASSISTANT), "messages[0].role", "is missing"),
    (chat({"role": None, "content": "q"}, ASSISTANT), "messages[0].role", "is null"),
    (talk({"value": "q"}, GPT), "conversations[0].from", "is missing"),
    (talk({"from": "human"}, GPT), "conversations[0].value", "is missing"),
    (talk({"from": "human", "value": None}, GPT), "conversations[0].value", "is null"),
    # unknown roles
    (
        chat({"role": "bot", "content": "q"}),
        "messages[0].role",
        "'bot'; the known roles are system, developer, user, assistant",
    ),
    (chat({"role": ["user"], "content": "q"}), "messages[0].role", "the known roles are"),
    (
        talk({"from": "alien", "value": "q"}),
        "conversations[0].from",
        "'alien'; the known speakers are system, developer, human",
    ),
    # content that is not text
    (chat({"role": "user", "content": 7}, ASSISTANT), "messages[0].content", "is a number, not text"),
    (chat({"role": "user", "content": {"a": 1}}, ASSISTANT), "messages[0].content", "is an object, not text"),
    (chat({"role": "user", "content": ["q"]}, ASSISTANT), "messages[0].content[0]", "is text, not an object"),
    (
        chat({"role": "user", "content": [{"type": "image", "value": "x"}]}, ASSISTANT),
        "messages[0].content[0]",
        "block type 'image'",
    ),
    (talk({"from": "human", "value": 7}, GPT), "conversations[0].value", "is a number, not text"),
    ({"text": 7}, "text", "is a number, not text"),
    ({"text": ["a"]}, "text", "is a list, not text"),
    ({"prompt": 7, "completion": "a"}, "prompt", "is a number"),
    ({"prompt": "a", "completion": [ASSISTANT]}, "completion", "both must be the same"),
    ({"instruction": "a", "input": 7, "output": "b"}, "input", "is a number, not text"),
    ({"instruction": "a", "output": ["b"]}, "output", "is a list, not text"),
    ({"instruction": "a", "output": "b", "system": 7}, "system", "is a number, not text"),
    ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0]", "pair"),
    # wrong shapes
    ({"messages": "hi"}, "messages", "is text, not a list"),
    ({"messages": []}, "messages", "is an empty list"),
    ({"messages": ["hi"]}, "messages[0]", "is text, not an object"),
    ({"messages": {"role": ["user"], "content": ["a", "b"]}}, "messages", "is an object, not a list"),
    # empty turns
    (chat(USER, {"role": "assistant", "content": ""}), "messages[1].content", "empty assistant turn"),
    (chat(USER, {"role": "assistant", "content": " \n"}), "messages[1].content", "empty assistant turn"),
    (chat(USER, {"role": "assistant", "content": []}), "messages[1].content", "is null"),
    (talk(HUMAN, {"from": "gpt", "value": ""}), "conversations[1].value", "empty assistant turn"),
    ({"instruction": "a", "output": ""}, "output", "empty assistant turn"),
    ({"instruction": "", "input": "", "output": "b"}, "instruction", "is empty"),
    ({"instruction": "a", "output": "b", "history": [["q", ""]]}, "history[0]", "empty assistant turn"),
    ({"prompt": "a", "completion": ""}, "completion", "is empty"),
    ({"text": " "}, "text", "is empty"),
    # nothing to train on
    (chat(USER), "messages", "has no assistant turn"),
    (talk(HUMAN), "messages", "has no assistant turn"),
    ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "completion", "has no assistant turn"),
    (chat(USER, {**ASSISTANT, "weight": 0}), "messages", "weight 0"),
    (chat(USER, {**ASSISTANT, "weight": 0.5}), "messages[1].weight", "is 0.5"),
    (chat(USER, {**ASSISTANT, "weight": 0, "train": True}), "messages[1].train", "opposite of weight"),
    (chat(USER, {**ASSISTANT, "mask": True}), "messages[1].mask", "write train: true"),
    (
        chat(USER, {**ASSISTANT, "train_detail": [{"end_offset": 1}]}),
        "messages[1].train_detail",
        "parts of a turn",
    ),
    (chat({**USER, "train": True}, ASSISTANT), "messages[0].train", "only an assistant's is"),
    (chat({**USER, "thinking": "hm"}, ASSISTANT), "messages[0].thinking", "only an assistant's"),
    (chat(USER, {**ASSISTANT, "thinking": "x", "reasoning": "y"}), "messages[1].thinking", "keep one"),
    (chat({**USER, "images": ["a.png"]}, ASSISTANT), "messages[0].images", "is not known"),
    (
        {**chat({"role": "system", "content": "A"}, USER, ASSISTANT), "system": "B"},
        "system",
        "another system",
    ),
    (talk({"from": ["human"], "value": "q"}, GPT), "conversations[0].from", "the known speakers"),
    (talk({**HUMAN, "content": "other"}, GPT), "conversations[0].content", "stands beside value"),
    # tools
    (chat({**USER, "tool_calls": [{"name": "f"}]}, ASSISTANT), "messages[0].tool_calls", "only an assistant"),
    (chat(USER, {**ASSISTANT, "tool_calls": [{"id": "1"}]}), "messages[1].tool_calls[0]", "no function name"),
    (
        chat(USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "{"}]}),
        "messages[1].tool_calls[0].arguments",
        "should hold JSON",
    ),
    (
        chat(USER, {**ASSISTANT, "tool_calls": [{"name": "f", "parameters": {"x": 1}}]}),
        "messages[1].tool_calls[0].parameters",
        "stand under arguments",
    ),
    (
        chat(USER, {**ASSISTANT, "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}),
        "messages[1].function_call",
        "keep one",
    ),
    (chat(USER, {**ASSISTANT, "function_call": "f"}), "messages[1].function_call[0]", "not an object"),
    (talk(HUMAN, {"from": "function_call", "value": "{"}), "conversations[1].value", "should hold JSON"),
    ({"messages": [USER, ASSISTANT], "tools": "["}, "tools", "should hold JSON"),
    ({"messages": [USER, ASSISTANT], "tools": 7}, "tools", "is a number, not a list"),
]


@pytest.mark.parametrize(
    ("row", "column", "reason"), BAD, ids=[f"{column}-{i}" for i, (_, column, _) in enumerate(BAD)]
)
def test_bad_rows(row, column, reason):
    with pytest.raises(RowError) as error:
        to_conversation(row)
    assert error.value.column == column
    assert reason in error.value.reason
