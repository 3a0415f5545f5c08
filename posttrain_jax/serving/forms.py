"""OpenAI's JSON objects for completions and chats, complete and in chunks."""

from __future__ import annotations

import dataclasses
import secrets
import time
from typing import Any, Protocol

from posttrain_jax.serving.pieces import Piece, TokenScore, finite
from posttrain_jax.serving.token_text import Vocabulary

JsonObject = dict[str, Any]


class Form(Protocol):
    """One of OpenAI's two formats of a response."""

    def opening(self, index: int) -> JsonObject | None:
        """The choice of a chunk that comes before a choice's first piece, if there is one."""

    def chunk(self, index: int, piece: Piece) -> list[JsonObject]:
        """The choices of the chunks for a piece, one a chunk."""

    def choice(self, index: int, piece: Piece) -> JsonObject:
        """A whole choice."""

    def body(self, choices: list[JsonObject], *, chunk: bool) -> JsonObject:
        """The object around choices."""


def usage(prompt_tokens: int, completion_tokens: int) -> JsonObject:
    """The counts of one request; a prompt counts once, however many completions it has."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclasses.dataclass(frozen=True)
class _Head:
    id: str
    created: int
    model: str

    @staticmethod
    def of(kind: str, model: str) -> _Head:
        return _Head(f"{kind}-{secrets.token_hex(12)}", int(time.time()), model)

    def body(self, name: str, choices: list[JsonObject]) -> JsonObject:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class CompletionForm:
    """/v1/completions. `alternatives` as `Body.alternatives`."""

    def __init__(self, model: str, vocabulary: Vocabulary, *, alternatives: int | None) -> None:
        self._head = _Head.of("cmpl", model)
        self._vocabulary = vocabulary
        self._alternatives = alternatives

    def opening(self, index: int) -> JsonObject | None:
        """Nothing."""
        del index
        return None

    def chunk(self, index: int, piece: Piece) -> list[JsonObject]:
        """A chunk has the fields of a whole choice."""
        return [self.choice(index, piece)] if piece.text or piece.scores or piece.finish_reason else []

    def choice(self, index: int, piece: Piece) -> JsonObject:
        """Text, log-probabilities, and why it ended."""
        logprobs = None if self._alternatives is None else self._logprobs(piece.scores)
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def body(self, choices: list[JsonObject], *, chunk: bool) -> JsonObject:
        """Chunks have the name of the whole."""
        del chunk
        return self._head.body("text_completion", choices)

    def _logprobs(self, scores: list[TokenScore]) -> JsonObject:
        return {
            "tokens": [self._vocabulary.name(score.token) for score in scores],
            "token_logprobs": [None if s.logprob is None else finite(s.logprob) for s in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": [score.offset for score in scores],
        }

    def _top(self, score: TokenScore) -> dict[str, float] | None:
        """The likeliest tokens and the one that was drawn; of two with the same text the likelier."""
        if score.logprob is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in [*score.alternatives, (score.token, score.logprob)]:
            # Where the drawn token is among the likeliest, it has one number, not two roundings of it.
            value = score.logprob if token == score.token else logprob
            top.setdefault(self._vocabulary.name(token), finite(value))
        return top


class ChatForm:
    """/v1/chat/completions. `alternatives` as `Body.alternatives`."""

    def __init__(self, model: str, vocabulary: Vocabulary, *, alternatives: int | None) -> None:
        self._head = _Head.of("chatcmpl", model)
        self._vocabulary = vocabulary
        self._alternatives = alternatives

    def opening(self, index: int) -> JsonObject | None:
        """The role."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, piece: Piece) -> list[JsonObject]:
        """Text in one chunk, the end in another with an empty delta."""
        chunks = []
        if piece.text or piece.scores:
            chunks.append(self._delta(index, {"content": piece.text}, self._logprobs(piece), None))
        if piece.finish_reason is not None:
            chunks.append(self._delta(index, {}, None, piece.finish_reason))
        return chunks

    def choice(self, index: int, piece: Piece) -> JsonObject:
        """A message, log-probabilities, and why it ended."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def body(self, choices: list[JsonObject], *, chunk: bool) -> JsonObject:
        """Chunks have a name of their own."""
        return self._head.body("chat.completion.chunk" if chunk else "chat.completion", choices)

    def _delta(
        self, index: int, delta: JsonObject, logprobs: JsonObject | None, reason: str | None
    ) -> JsonObject:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, piece: Piece) -> JsonObject | None:
        if self._alternatives is None:
            return None
        content = []
        for score in piece.scores:
            assert score.logprob is not None  # only a prompt's first token has none
            top = [
                self._token(token, score.logprob if token == score.token else logprob)
                for token, logprob in score.alternatives
            ]
            content.append({**self._token(score.token, score.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> JsonObject:
        return {
            "token": self._vocabulary.text(token),
            "logprob": finite(logprob),
            "bytes": list(self._vocabulary.bytes(token)),
        }
