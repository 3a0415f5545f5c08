"""The chat template of an exported reward model: it ends where the score is read.

A score is trained and read at the token that ends the last turn. Most templates write something after it (ChatML: a
newline), and transformers reads a score at the last token of a row. So the template that goes with an exported reward
model leaves that out after the last turn, and `apply_chat_template(..., tokenize=True)` gives rows that are scored as
here. (Training at the newline instead would move the score away from the token that the policy itself writes last.)
"""

from __future__ import annotations

import copy
import logging
import re

import jinja2
from transformers import PreTrainedTokenizerFast

from posttrain_jax.models.io.tokenizer import end_of_turn_id

_USER, _ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "posttrain"}
_CHATS = ([_USER, _ANSWER], [_USER, _ANSWER, _USER, _ANSWER])
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def for_scoring(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer whose chat templates end with the end of the last turn.

    A template that cannot be made so (it refuses a plain conversation, or ends turns with no special token) stays as
    it is; where it writes something after the end of the turn, a message says so.
    """
    made = copy.deepcopy(tokenizer)
    if isinstance(tokenizer.chat_template, dict):
        made.chat_template = {name: _ended(made, text) for name, text in tokenizer.chat_template.items()}
    elif tokenizer.chat_template:
        made.chat_template = _ended(made, tokenizer.chat_template)
    return made


def _ended(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    """The template, wrapped where it must be."""
    tokenizer.chat_template = template
    end = end_of_turn_id(tokenizer)
    if end is None:
        return template
    token = tokenizer.added_tokens_decoder[end].content
    before = _rendered(tokenizer)
    text = before[0][0]
    after = text.removeprefix(_cut(text, token))
    if not after:
        return template
    ending = token + after
    condition = f"messages[-1]['role'] == 'assistant' and rendered.endswith({ending!r})"
    cut = f"{{{{ rendered[:-{len(after)}] if {condition} else rendered }}}}"
    # Tags that mark what is trained count characters, which they cannot do inside a block.
    plain = _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", template)
    tokenizer.chat_template = f"{{% set rendered %}}{plain.removesuffix(chr(10))}{{% endset %}}{cut}"
    expected = [[_cut(row[0], token), row[1] if row[1] != row[0] else _cut(row[0], token)] for row in before]
    try:
        if _rendered(tokenizer) == expected:
            return str(tokenizer.chat_template)
    except jinja2.TemplateError:
        pass
    logging.getLogger(__name__).warning(
        "The exported chat template writes %r after the end of the last turn: take it away before you score.",
        after,
    )
    return template


def _cut(text: str, token: str) -> str:
    return text[: text.rindex(token) + len(token)] if token in text else text


def _rendered(tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """Some conversations, without and with the generation prompt; "" for one that the template refuses."""

    def one(chat: list[dict[str, str]], prompt: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
        except (jinja2.TemplateError, TypeError, ValueError):
            return ""

    return [[one(chat, prompt) for prompt in (False, True)] for chat in _CHATS]
