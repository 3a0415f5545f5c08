"""The web application: OpenAI's paths over the engine, with its errors.

/v1/models, /v1/completions, /v1/chat/completions, and /health, which alone needs no key.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from posttrain_jax.serving.bodies import Body, ChatBody, CompletionBody
from posttrain_jax.serving.errors import STOPPED, TOO_LARGE, ApiError, error_response, handle_errors
from posttrain_jax.serving.forms import ChatForm, CompletionForm, Form, JsonObject
from posttrain_jax.serving.parsed_request import Limits, ParsedRequest, parse_request
from posttrain_jax.serving.responses import (
    EventStream,
    ResponsePieces,
    events,
    while_connected,
    whole_response,
)
from posttrain_jax.serving.token_text import Vocabulary
from posttrain_jax.serving.worker import Worker

LONG_TEXT = 20_000  # characters that take some 10 ms to tokenize
JOIN_SECONDS = 5.0  # how long shutdown waits for the engine's thread, which may be compiling


@dataclasses.dataclass(frozen=True)
class Service:
    """What the application serves.

    Attributes:
      name: the model's name for clients.
      tokenizer: encodes prompts, in threads, and decodes completions; the engine has another one.
      limits: what requests may ask for.
      worker: the engine's thread; started and stopped with the application.
      api_key: clients must send it as a bearer token; "" = none is needed.
      max_body_bytes: the largest body of a request.
      idle_seconds: how long the body of a request may take to arrive.
      stopping: whether the server is shutting down.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    worker: Worker
    api_key: str
    max_body_bytes: int
    idle_seconds: float
    stopping: Callable[[], bool]


def make_app(service: Service) -> FastAPI:
    """The application; the engine's thread starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        service.worker.start()
        yield
        readers.close()
        service.worker.stop()
        await asyncio.to_thread(service.worker.join, JOIN_SECONDS)

    readers = Readers()
    app = FastAPI(title="posttrain_jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service)
    handle_errors(app)
    vocabulary = Vocabulary(service.tokenizer)
    created = int(time.time())
    card = {"id": service.name, "object": "model", "created": created, "owned_by": "posttrain_jax"}
    card["max_model_len"] = service.limits.max_length

    @app.get("/health")
    async def health() -> JSONResponse:
        worker = service.worker
        if worker.stopped or service.stopping():
            return error_response(STOPPED)
        return JSONResponse({"status": "ok", "running": worker.running, "waiting": worker.waiting})

    @app.get("/v1/models")
    async def models() -> JsonObject:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JsonObject:
        _check_model(name, service)
        return card

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        form = CompletionForm(service.name, vocabulary, alternatives=body.alternatives)
        return await _respond(request, body, form, service, vocabulary, readers)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        form = ChatForm(service.name, vocabulary, alternatives=body.alternatives)
        return await _respond(request, body, form, service, vocabulary, readers)

    return app


async def _respond(
    request: Request, body: Body, form: Form, service: Service, vocabulary: Vocabulary, readers: Readers
) -> Response:
    """Responds to a checked body, at once or as a stream; when the client disconnects, the work is cancelled."""
    _check_model(body.model, service)
    service.worker.check_room(1)
    parsed = await readers.parse_request(body, service, vocabulary)
    # Two numbers of alternatives for scored prompts, so two programs: one is all that loglikelihood tasks ask for.
    most = 1 if (parsed.alternatives or 0) <= 1 else service.limits.alternatives
    pieces = ResponsePieces(parsed, service.worker, service.tokenizer, vocabulary, prompt_alternatives=most)
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(events(pieces, form, with_usage=with_usage), close=pieces.close)
    try:
        return JSONResponse(await while_connected(request, whole_response(pieces, form)))
    finally:
        pieces.close()


def _check_model(name: str, service: Service) -> None:
    if name != service.name:
        raise ApiError(
            404,
            f"there is no model {name!r} here; this server has {service.name!r}.",
            code="model_not_found",
            param="model",
        )


class Readers:
    """Threads that tokenize prompts: long prompts wait for each other, and short ones do not wait for long ones."""

    def __init__(self) -> None:
        self._short = concurrent.futures.ThreadPoolExecutor(2, "short prompts")
        self._long = concurrent.futures.ThreadPoolExecutor(1, "long prompts")

    async def parse_request(self, body: Body, service: Service, vocabulary: Vocabulary) -> ParsedRequest:
        """See `parsed_request.parse_request`."""
        pool = self._long if body.characters > LONG_TEXT else self._short
        parse = functools.partial(parse_request, body, service.tokenizer, vocabulary, service.limits)
        return await asyncio.get_running_loop().run_in_executor(pool, parse)

    def close(self) -> None:
        """Drops what waits."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)


class Gate:
    """Lets a request in if it has the key (/health needs none), the server is not stopping, and its body is not too
    large and arrives in time."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            error = self._refusal(dict(scope["headers"]))
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        size, complete = 0, False
        end = asyncio.get_running_loop().time() + self._service.idle_seconds

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # from now on it waits for the client to disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408) from None
            complete = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._service.max_body_bytes:
                raise HTTPException(413)
            return message

        await self._app(scope, limited, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._service.api_key:
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            is_right = secrets.compare_digest(token.strip(), self._service.api_key.encode())
            if kind.lower() != b"bearer" or not is_right:
                return ApiError(
                    401,
                    "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > self._service.max_body_bytes:
            return TOO_LARGE
        return STOPPED if self._service.worker.stopped or self._service.stopping() else None
