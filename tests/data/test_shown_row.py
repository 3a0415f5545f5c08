"""What people are shown of a row."""

from __future__ import annotations

import numpy as np

from posttrain_jax.data.chat import encode
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.data.shown_row import empty_warning, shown_row
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer

from .chats import chat_row


def shown(*turns: str) -> str:
    tokenizer = byte_tokenizer()
    encoded = encode(to_conversation(chat_row(*turns)), tokenizer)
    return shown_row(tokenizer, encoded.tokens, encoded.loss_mask)


def test_special_tokens_are_seen_and_the_trained_part_is_marked():
    assert shown("Hé\x1b[2J", "yes\nno") == (
        r"<|im_start|>user\nHé\x1b[2J<|im_end|>\n<|im_start|>assistant\n[[yes\nno<|im_end|>]]\n"
    )


def test_a_prompt_has_no_trained_part():
    tokenizer = byte_tokenizer()
    assert shown_row(tokenizer, np.asarray(tokenizer("a\tb")["input_ids"])) == r"a\tb"
    assert shown_row(tokenizer, np.zeros(0, np.int32)) == ""


def test_the_length_is_bounded():
    text = shown("x" * 10**5, "y" * 10**5)
    assert len(text) < 1000 and text.count("[...]") == 2
    assert text.endswith(r"y<|im_end|>]]\n")
    many = shown(*["a"] * 100)
    assert len(many) < 1000 and many.endswith(" [...]")


def test_a_third_of_completions_may_be_empty():
    assert empty_warning(1, 3) == "" and empty_warning(0, 0) == ""
    assert "2 of 5 completions are empty" in empty_warning(2, 5)
