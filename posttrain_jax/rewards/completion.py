"""A completion as a reward function sees it. Imports nothing heavy, for the processes of reward functions import it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from posttrain_jax.rewards.thoughts import after_thought, opens_thought

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of a model, with its prompt and the data row that the prompt came from.

    Attributes:
      prompt: the prompt's text, or its messages ({"role", "content"}).
      prompt_ids: the tokens that the model read.
      text: the completion's text, without the token that ended it.
      token_ids: the completion's tokens; the stop token that ended it is the last of them.
      finish_reason: "stop" (the model ended its turn) or "length" (it was cut off).
      row: the data row's columns, such as the reference answer of a problem.
      in_thought: the prompt's last word is `<think>`, so the text starts inside a thought.
    """

    prompt: str | Messages
    prompt_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    row: dict[str, Any]
    in_thought: bool = False

    def after_thought(self) -> str | None:
        """The text after the thought, which is all of a text without one; None where a thought was not ended."""
        opened = self.in_thought or (isinstance(self.prompt, str) and opens_thought(self.prompt))
        return after_thought(self.text, in_thought=opened)


RewardFunction = Callable[[list[Completion]], Sequence[float]]
"""A reward: completions to numbers, as many, in their order. A number may depend on its own completion only."""
