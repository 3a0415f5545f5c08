"""Thoughts: what a reasoning model writes between `<think>` and `</think>` before its answer.

Rewards, evaluations and judges look at what follows the thought, by the one rule of `after_thought`. Many chat
templates write `<think>` themselves, at the end of the prompt; the answer then starts inside its thought, and only the
prompt says so. Imports nothing heavy, for the processes of reward functions import it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<think>", "</think>"
_OPENED = re.compile(r"""(?<!["'`“‘])<think>""")  # in quotes it is spoken of
_LAST_TOKENS = 32  # of a prompt hold <think> and the white space after it, also where a token is a byte


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends with `<think>`, white space aside."""
    return prompt.rstrip().endswith(OPEN)


def prompt_opens_thought(tokenizer: PreTrainedTokenizerBase | None, prompt_ids: Sequence[int]) -> bool:
    """`opens_thought` of a prompt's tokens; False without a tokenizer."""
    if tokenizer is None:
        return False
    return opens_thought(tokenizer.decode(list(prompt_ids[-_LAST_TOKENS:])))


def answer_text(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] | np.ndarray, *, stop_at: int | None = None
) -> str:
    """A completion's text without special tokens, but with `<think>` and `</think>` where the tokenizer has these as
    such: without them nobody could tell the thought from the answer.

    Args:
      tokenizer: of the model that wrote it.
      tokens: of the completion.
      stop_at: where a stop string begins in the text without any special token; the text ends there.
    """
    marks, ids = _special_marks(tokenizer), [int(token) for token in tokens]
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    text, start = "", 0
    for end in [place for place, token in enumerate(ids) if token in marks]:
        text += tokenizer.decode(ids[start:end], skip_special_tokens=True) + marks[ids[end]]
        start = end + 1
    text += tokenizer.decode(ids[start:], skip_special_tokens=True) if start else plain
    return text if stop_at is None else text[: len(text) - (len(plain) - stop_at)]


def _special_marks(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """`<think>` and `</think>` by their ids, as far as they are tokens that a text leaves out."""
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in (OPEN, CLOSE)}
    return {
        index: mark
        for mark, index in ids.items()
        if isinstance(index, int)
        and tokenizer.convert_ids_to_tokens(index) == mark
        and not tokenizer.decode([index], skip_special_tokens=True)
    }


def after_thought(text: str, *, in_thought: bool = False) -> str | None:
    """The part of a completion that is meant for the reader: what follows the last `</think>`, or all of one without
    a thought; None where a thought was begun and not ended, for then there is no answer.

    Args:
      text: of the completion.
      in_thought: the prompt opened the thought (see `prompt_opens_thought`).
    """
    _, closed, rest = text.rpartition(CLOSE)
    if (in_thought and not closed) or _OPENED.search(rest):
        return None
    return rest.strip() if closed else rest
