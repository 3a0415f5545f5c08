"""The chat template that an exported reward model gets."""

from __future__ import annotations

import logging
import pathlib

import pytest

from posttrain_jax.data.chat import encode
from posttrain_jax.data.formats import to_conversation
from posttrain_jax.models.io.byte_tokenizer import byte_tokenizer
from posttrain_jax.models.io.scoring_template import for_scoring

TEMPLATES = pathlib.Path(__file__).parents[2] / "data" / "templates"
USER, ANSWER = {"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": "42"}
CHAT = [USER, ANSWER, USER, ANSWER]


@pytest.mark.parametrize("name", ["qwen3", "zephyr", "no_prompt_chatml", "generation_tags", "alternating"])
def test_it_ends_with_the_end_of_the_last_turn_and_is_the_same_else(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    made = for_scoring(tokenizer)
    before = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert made.apply_chat_template(CHAT, tokenize=False) == before[: before.rindex("<|im_end|>") + 10]
    prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert made.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == prompt
    # and a run that starts from the exported model trains the same tokens
    conversation = to_conversation({"messages": CHAT})
    ours, theirs = encode(conversation, tokenizer), encode(conversation, made)
    assert list(theirs.tokens[theirs.loss_mask]) == list(ours.tokens[ours.loss_mask])


def test_what_needs_no_change_or_cannot_have_it_stays(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    for template in (
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
        None,
    ):
        tokenizer.chat_template = template
        assert for_scoring(tokenizer).chat_template == template
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        # What it writes after the last turn depends on the conversation, so no fixed text can be cut off.
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ messages | length }} turns"
        )
        assert for_scoring(tokenizer).chat_template == tokenizer.chat_template
    assert "writes '2 turns' after the end of the last turn" in caplog.text
