"""A completion piece by piece: the engine's updates as text with its tokens, ready for a response."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain_jax.sampling.requests import Request, Update
from posttrain_jax.serving.parsed_request import EncodedPrompt
from posttrain_jax.serving.prompt_scores import PromptScores
from posttrain_jax.serving.token_text import Detokenizer, Vocabulary, held_back

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """One token of a piece.

    Attributes:
      token: its id.
      logprob: nats, under the model itself; None for a prompt's first token.
      alternatives: the likeliest tokens at its index with their log-probabilities, the likeliest first.
      offset: where its text begins, counted from the start of the choice's text.
    """

    token: int
    logprob: float | None
    alternatives: list[tuple[int, float]]
    offset: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one choice.

    Attributes:
      text: what is added to the choice's text; text that may be the start of a stop string is held back.
      scores: its tokens, if log-probabilities are requested.
      count: how many tokens were generated.
      finish_reason: "stop" or "length" in the last piece.
    """

    text: str
    scores: list[TokenScore]
    count: int = 0
    finish_reason: str | None = None


def join(pieces: Iterable[Piece]) -> Piece:
    """Several pieces of one choice as one."""
    parts = list(pieces)
    return Piece(
        text="".join(part.text for part in parts),
        scores=[score for part in parts for score in part.scores],
        count=sum(part.count for part in parts),
        finish_reason=parts[-1].finish_reason,
    )


class Writer:
    """Turns the updates of one completion into pieces.

    Args:
      request: what is completed.
      alternatives: how many to report beside each token; None = no log-probabilities.
      offset: length of the text before the completion.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        request: Request,
        *,
        alternatives: int | None,
        offset: int = 0,
    ) -> None:
        self._vocabulary = vocabulary
        self._stops = request.stop_strings
        self._alternatives = alternatives
        self._offset = offset
        self._detokenizer = Detokenizer(tokenizer)
        self._held = ""
        self._given = 0

    def piece(self, update: Update) -> Piece:
        """The piece that an update adds."""
        ids = update.tokens.tolist()
        stop_token = update.finish_reason == "stop" and update.stop_string is None
        text = self._held + "".join(map(self._detokenizer.add, ids[:-1] if stop_token else ids))
        if update.finish_reason is None:
            keep = len(text) - held_back(text, self._stops)
            text, self._held = text[:keep], text[keep:]
        else:
            text += self._detokenizer.rest()
            if update.stop_at is not None:
                text = text[: max(update.stop_at - self._given, 0)]
        self._given += len(text)
        scores = [] if self._alternatives is None else self._scores(update, self._alternatives)
        return Piece(text, scores, len(ids), update.finish_reason)

    def _scores(self, update: Update, most: int) -> list[TokenScore]:
        scores = []
        for index, (token, logprob) in enumerate(
            zip(update.tokens.tolist(), update.logprobs.tolist(), strict=True)
        ):
            alternatives = update.alternatives[index][:most] if most else []
            scores.append(TokenScore(token, logprob, alternatives, self._offset))
            if not self._vocabulary.is_special(token):
                self._offset += self._vocabulary.length(token)
        return scores


def echo_piece(
    prompt: EncodedPrompt, scores: PromptScores | None, vocabulary: Vocabulary, *, alternatives: int | None
) -> Piece:
    """The prompt itself as the first piece of a completion."""
    if scores is None or alternatives is None:
        return Piece(prompt.text, [])
    offset, tokens = 0, []
    for index, token in enumerate(prompt.tokens.tolist()):
        logprob = float(scores.logprobs[index - 1]) if index else None
        likeliest = _row(scores, index - 1)[:alternatives] if index else []
        tokens.append(TokenScore(token, logprob, likeliest, offset))
        if index >= prompt.silent:
            offset += vocabulary.length(token)
    return Piece(prompt.text, tokens)


def scored_update(request: Request, scores: PromptScores) -> Update:
    """The completion of one token, the likeliest, that the scores of its prompt hold already."""
    token, logprob = _row(scores, len(request.tokens) - 1)[0]
    return Update(
        request_id=-1,
        tokens=np.asarray([token], np.int32),
        logprobs=np.asarray([logprob], np.float32),
        sample_logprobs=np.zeros(1, np.float32),
        alternatives=[_row(scores, len(request.tokens) - 1)],
        finish_reason="stop" if token in request.stop_token_ids else "length",
    )


def _row(scores: PromptScores, index: int) -> list[tuple[int, float]]:
    ids, logprobs = scores.alternatives[index].tolist(), scores.alternative_logprobs[index].tolist()
    return list(zip(ids, logprobs, strict=True))


def finite(logprob: float) -> float:
    """The log-probability as JSON can hold it."""
    return max(LOWEST_LOGPROB, logprob)
