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


def after_thought(text: str, *, in_thought: bool = False) -> str | None:
    """The part of an answer that is meant for the reader: what follows the last `</think>`, or all of an answer without
    a thought; None where a thought was begun and not ended, for then there is no answer.

    Args:
      text: of the answer.
      in_thought: the prompt opened the thought (see `prompt_opens_thought`).
    """
    _, closed, rest = text.rpartition(CLOSE)
    if (in_thought and not closed) or _OPENED.search(rest):
        return None
    return rest.strip() if closed else rest
