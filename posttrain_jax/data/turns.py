"""Where an assistant's turns lie in a rendered conversation, and what a template puts around them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Span:
    """One assistant turn in the rendered text.

    Attributes:
      start: first character that the model writes.
      stop: end of the trained text before the end-of-turn token, or -1 when the turn runs up to that token.
    """

    start: int
    stop: int = -1


@dataclasses.dataclass(frozen=True)
class Turns:
    """A rendered conversation.

    Attributes:
      text: all of it.
      spans: of each assistant message, by its index.
      untrainable: messages that are not shown as the model would write them, with the reason: the template drops their
        thought, or puts something else before them than the generation prompt.
    """

    text: str
    spans: dict[int, list[Span]]
    untrainable: dict[int, str]


@dataclasses.dataclass(frozen=True)
class EndOfTurn:
    """The special tokens, nearly always one, that end a turn; `texts` and `token_ids` belong together."""

    texts: tuple[str, ...]
    token_ids: tuple[int, ...]

    @property
    def text(self) -> str:
        """The tokens' text, joined."""
        return "".join(self.texts)


@dataclasses.dataclass(frozen=True)
class TurnShape:
    """How a template surrounds an assistant's turn.

    Attributes:
      end: what ends a turn.
      tool_end: what ends a turn that calls tools (Llama 3.1 may end those differently).
      between_turns: `end` also ends turns that others follow, not only the last.
      header: text that the template puts before an assistant's content, when it has no generation prompt.
      prompt: the generation prompt.
    """

    end: EndOfTurn
    tool_end: EndOfTurn
    between_turns: bool
    header: str
    prompt: str
