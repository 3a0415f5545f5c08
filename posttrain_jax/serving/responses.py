"""The response to a parsed request: all of it as one object, or piece by piece as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.sampling.requests import Request as EngineRequest
from posttrain_jax.sampling.requests import Update
from posttrain_jax.serving.errors import STOPPED, ClientGone, error_body
from posttrain_jax.serving.forms import Form, JsonObject, usage
from posttrain_jax.serving.parsed_request import ParsedRequest
from posttrain_jax.serving.pieces import Piece, Writer, echo_piece, join, scored_update
from posttrain_jax.serving.prompt_scores import PromptScores
from posttrain_jax.serving.token_text import Vocabulary
from posttrain_jax.serving.worker import Results, ScoringRequest, Stopped, Worker

T = TypeVar("T")


class ResponsePieces:
    """The completions of a parsed request, piece by piece. `close` must be called.

    `prompt_alternatives`: how many of the likeliest tokens are computed at each token of a scored prompt.
    """

    def __init__(
        self,
        parsed: ParsedRequest,
        worker: Worker,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        *,
        prompt_alternatives: int,
    ) -> None:
        self.parsed = parsed
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._generated = parsed.generated
        requests = [parsed.requests[index] for index in self._generated]
        scorings = []
        if parsed.scores_prompts:
            scorings = [ScoringRequest(prompt.tokens, prompt_alternatives) for prompt in parsed.prompts]
        worker.check_room(len(requests) + len(scorings))
        self._scorings = Results(worker, scorings)
        self._completions = Results(worker, requests)

    def close(self) -> None:
        """Cancels what is not done."""
        self._scorings.close()
        self._completions.close()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index of the choice, piece) as they come; a choice's last piece has its finish_reason."""
        parsed = self.parsed
        scores: dict[int, PromptScores] = {}
        async for number, event in self._scorings:
            assert isinstance(event, PromptScores)
            scores[number] = event
        writers = []
        for index, request in enumerate(parsed.requests):
            prompt = parsed.prompts[index // parsed.n]
            prompt_scores = scores.get(index // parsed.n)
            writers.append(self._writer(request, offset=len(prompt.text)))
            if parsed.echo:
                echo = echo_piece(prompt, prompt_scores, self._vocabulary, alternatives=parsed.alternatives)
                yield index, echo
            if request.max_new_tokens == 0:
                yield index, Piece("", [], finish_reason="length")
            elif not parsed.is_generated(request):
                assert prompt_scores is not None
                yield index, writers[index].piece(scored_update(request, prompt_scores))
        async for number, event in self._completions:
            assert isinstance(event, Update)
            yield self._generated[number], writers[self._generated[number]].piece(event)

    def _writer(self, request: EngineRequest, *, offset: int) -> Writer:
        return Writer(
            self._tokenizer,
            self._vocabulary,
            request,
            alternatives=self.parsed.alternatives,
            offset=offset,
        )

    def usage(self, completion_tokens: int) -> JsonObject:
        """The counts."""
        return usage(sum(len(prompt.tokens) for prompt in self.parsed.prompts), completion_tokens)


async def whole_response(pieces: ResponsePieces, form: Form) -> JsonObject:
    """The response as one object."""
    parts: list[list[Piece]] = [[] for _ in pieces.parsed.requests]
    async for index, piece in pieces:
        parts[index].append(piece)
    joined = [join(part) for part in parts]
    body = form.body([form.choice(index, piece) for index, piece in enumerate(joined)], chunk=False)
    return {**body, "usage": pieces.usage(sum(piece.count for piece in joined))}


async def events(pieces: ResponsePieces, form: Form, *, with_usage: bool) -> AsyncIterator[str]:
    """The response as server-sent events. Its status is sent by then, so an error is an event too."""
    count = 0
    try:
        openings = [form.opening(index) for index in range(len(pieces.parsed.requests))]
        for choice in openings:
            if choice is not None:
                yield _event(_chunk(form, [choice], with_usage=with_usage))
        async for index, piece in pieces:
            count += piece.count
            for choice in form.chunk(index, piece):
                yield _event(_chunk(form, [choice], with_usage=with_usage))
        if with_usage:
            yield _event({**form.body([], chunk=True), "usage": pieces.usage(count)})
    except Stopped:
        yield _event(error_body(503, str(STOPPED), code=STOPPED.code))
    except InputError as error:
        yield _event(error_body(400, str(error)))
    yield "data: [DONE]\n\n"


def _chunk(form: Form, choices: list[JsonObject], *, with_usage: bool) -> JsonObject:
    body = form.body(choices, chunk=True)
    return {**body, "usage": None} if with_usage else body


def _event(value: JsonObject) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; `close` is called when the last one is sent or the client has disconnected."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], *, close: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of the work, unless the client disconnects first (then ClientGone, and the work is cancelled)."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        disconnected.cancel()
        task.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
