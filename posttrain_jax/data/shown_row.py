"""A row as the model sees it, in a line for people: special tokens visible, the trained part marked."""

from __future__ import annotations

import itertools

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain_jax.data.rows import one_line

TRAINED = ("[[", "]]")
_RUN_CHARACTERS, _RUNS, _TOKENS = 300, 8, 2000


def shown_row(
    tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, loss_mask: np.ndarray | None = None
) -> str:
    """The text of a sequence, of bounded length, control characters escaped.

    Args:
      tokenizer: its tokens' texts.
      tokens: int `[n]`.
      loss_mask: bool `[n]`, True where a token is trained: these stand between [[ and ]].
    """
    mask = np.zeros(len(tokens), bool) if loss_mask is None else loss_mask
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    parts = []
    for first, stop in itertools.pairwise(edges[: _RUNS + 1] if len(tokens) else []):
        ids = tokens[first:stop].tolist()
        if len(ids) > _TOKENS:  # the middle is left out below
            ids = ids[: _TOKENS // 2] + ids[-_TOKENS // 2 :]
        text = one_line(tokenizer.decode(ids, skip_special_tokens=False), _RUN_CHARACTERS)
        parts.append(f"{TRAINED[0]}{text}{TRAINED[1]}" if mask[first] else text)
    return "".join(parts) + (" [...]" if len(edges) > _RUNS + 1 else "")


def plain_text_warning(plain: int, rows: int, option: str) -> str:
    """What to say where rows are plain text and the tokenizer has a chat template."""
    return (
        f"{plain:,} of {rows:,} rows are plain text: they are taken as they are, without the model's chat template "
        f"({option} makes turns of a chat of them)."
    )


def empty_warning(empty: int, completions: int) -> str:
    """What to say where more than a third of the completions are empty; else ""."""
    if 3 * empty <= completions:
        return ""
    return (
        f"{empty:,} of {completions:,} completions are empty: the model ends at once. Look at the first prompt above; "
        "a model that was tuned on chats needs its chat template (messages, or text_as=chat)."
    )
