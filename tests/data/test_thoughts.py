"""Which thoughts are trained: those that the chat template shows as the model writes them."""

from __future__ import annotations

import pytest

from posttrain_jax.data.chat_template import ChatOptions
from posttrain_jax.data.rows import RowError
from posttrain_jax.data.spans import ChatTemplate

from .chats import TWO_TURNS, chat_row, encode_row, template_ids, trained_texts


def test_qwen3_thinking_is_trained_where_the_template_keeps_it(family):
    """Two questions; the first took a tool. The template drops the thoughts before the second question."""
    tokenizer = family("qwen3")
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    first = [
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "use add",
            "tool_calls": [{"function": call}],
        },
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\nFour."},
    ]
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    encoded = encode_row({"messages": first}, tokenizer)
    assert trained_texts(encoded, tokenizer) == [
        f"<think>\nuse add\n</think>\n\n{called}",
        "<think>\neasy\n</think>\n\nFour.<|im_end|>",
    ]
    second = [{"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Welcome"}]
    row = {"messages": first + second, "tools": [{"name": "add", "description": "adds", "parameters": {}}]}
    encoded = encode_row(row, tokenizer)
    # The first two turns stand there without their thoughts, as the model would never write them.
    assert trained_texts(encoded, tokenizer) == ["<think>\n\n</think>\n\nWelcome<|im_end|>"]
    assert encoded.untrained_turns == 2
    assert encoded.tokens.tolist() == template_ids(row, tokenizer)


THINKING = chat_row("6*7?", "<think>\n6*7 is 42\n</think>\n\n42")
APART = chat_row("6*7?", "42")
APART["messages"][1]["reasoning_content"] = "6*7 is 42"


@pytest.mark.parametrize("row", [THINKING, APART, TWO_TURNS])
def test_a_template_that_drops_thoughts_cannot_be_trained_on(row, family):
    """DeepSeek-R1's own: answers would be trained after the header, and generation starts after `<think>`."""
    with pytest.raises(
        RowError, match=r"messages\[\d\]: .*trained where the model.*configs/templates/deepseek_r1"
    ):
        encode_row(row, family("deepseek_r1"))


def test_a_template_that_shows_no_reasoning_content_refuses_it(smollm2):
    with pytest.raises(RowError, match=r"messages\[1\]: has a thought that this chat template does not show"):
        encode_row(APART, smollm2)
    assert trained_texts(encode_row(THINKING, smollm2), smollm2) == [
        "<think>\n6*7 is 42\n</think>\n\n42<|im_end|>"
    ]


@pytest.mark.parametrize("row", [THINKING, APART])
def test_the_template_for_deepseek_keeps_the_last_thought_and_starts_where_generation_does(row, family):
    tokenizer, path = family("deepseek_r1"), "configs/templates/deepseek_r1.jinja"
    rows = {"messages": [*row["messages"], *TWO_TURNS["messages"], *row["messages"]]}  # one question twice
    encoded = encode_row(rows, tokenizer, chat_template=path)
    assert trained_texts(encoded, tokenizer) == ["6*7 is 42\n</think>\n\n42<|endofsentence|>"]
    assert encoded.untrained_turns == 3
    template = ChatTemplate(tokenizer, ChatOptions(template=path))
    prompt = template.prompt(rows["messages"][:-1])
    assert prompt.endswith("<｜Assistant｜><think>\n")
    assert tokenizer.decode(encoded.tokens[: int(encoded.loss_mask.argmax())]) == prompt
