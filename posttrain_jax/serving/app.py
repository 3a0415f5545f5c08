"""The web application: OpenAI's paths over the engine, with its errors.

/v1/models, /v1/completions, /v1/chat/completions, and /health, which alone needs no key.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from posttrain_jax.core.errors import InputError
from posttrain_jax.sampling.requests import Request as EngineRequest
from posttrain_jax.sampling.requests import Update
from posttrain_jax.serving.bodies import Body, ChatBody, CompletionBody
from posttrain_jax.serving.forms import ChatForm, CompletionForm, Form, JsonObject, usage
from posttrain_jax.serving.orders import Limits, Order, order_of
from posttrain_jax.serving.pieces import Piece, Writer, echo_piece, join, scored_update
from posttrain_jax.serving.prompt_scores import PromptScores
from posttrain_jax.serving.token_text import Vocabulary
from posttrain_jax.serving.worker import Answers, Full, Scoring, Stopped, Worker

T = TypeVar("T")

LONG_TEXT = 20_000  # characters that take some 10 ms to tokenize
END_SECONDS = 5.0  # that the engine's thread is waited for: it may be in the middle of compiling


@dataclasses.dataclass(frozen=True)
class Service:
    """What the application serves.

    Attributes:
      name: the model's, as clients must call it.
      tokenizer: for reading prompts, in threads, and writing answers; the engine has another one.
      limits: what is possible.
      worker: the engine's thread; started and stopped with the application.
      api_key: clients must send it as a bearer token; "" = anyone may ask.
      max_body_bytes: of one request.
      idle_seconds: how long the body of a request may take.
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


class ApiError(Exception):
    """An error as the client will read it."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class ClientGone(Exception):
    """The client hung up; nobody reads the answer."""


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> JsonObject:
    """OpenAI's error object."""
    kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
    return JSONResponse(
        error_body(error.status, str(error), code=error.code, param=error.param),
        status_code=error.status,
        headers=headers.get(error.status),
    )


STOPPED = ApiError(503, "the server is shutting down.", code="service_unavailable")
TOO_LARGE = ApiError(413, "the body is too large (--max_body_mb).")


class Readers:
    """Threads that make prompts into tokens: long ones wait for each other, and short ones do not wait for them."""

    def __init__(self) -> None:
        self._short = concurrent.futures.ThreadPoolExecutor(2, "short prompts")
        self._long = concurrent.futures.ThreadPoolExecutor(1, "long prompts")

    async def order_of(self, body: Body, service: Service, vocabulary: Vocabulary) -> Order:
        """See `orders.order_of`."""
        pool = self._long if body.characters > LONG_TEXT else self._short
        read = functools.partial(order_of, body, service.tokenizer, vocabulary, service.limits)
        return await asyncio.get_running_loop().run_in_executor(pool, read)

    def close(self) -> None:
        """Forgets what waits."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)


def make_app(service: Service) -> FastAPI:
    """The application; its start and end are those of the engine's thread."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        service.worker.start()
        yield
        readers.close()
        service.worker.stop()
        await asyncio.to_thread(service.worker.join, END_SECONDS)

    readers = Readers()
    app = FastAPI(title="posttrain_jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service)
    _handle_errors(app)
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
        return await _answer(request, body, form, service, vocabulary, readers)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        form = ChatForm(service.name, vocabulary, alternatives=body.alternatives)
        return await _answer(request, body, form, service, vocabulary, readers)

    return app


class Gate:
    """Lets a request in if it has the key (/health needs none), the server can still answer, and its body is not too
    large and comes in time."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            error = self._refusal(dict(scope["headers"]))
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        size, whole = 0, False
        end = asyncio.get_running_loop().time() + self._service.idle_seconds

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # from now on it waits for the client to hang up
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408) from None
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._service.max_body_bytes:
                raise HTTPException(413)
            return message

        await self._app(scope, limited, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._service.api_key:
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            right = secrets.compare_digest(token.strip(), self._service.api_key.encode())
            if kind.lower() != b"bearer" or not right:
                return ApiError(
                    401,
                    "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > self._service.max_body_bytes:
            return TOO_LARGE
        return STOPPED if self._service.worker.stopped or self._service.stopping() else None


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        del request
        return error_response(error)

    @app.exception_handler(InputError)
    async def input_error(request: Request, error: InputError) -> JSONResponse:
        del request
        code = "context_length_exceeded" if "maximum context length" in str(error) else None
        return error_response(ApiError(400, str(error), code=code))

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> JSONResponse:
        del request, error
        return error_response(
            ApiError(429, "the queue is full; ask again in a moment.", code="rate_limit_exceeded")
        )

    @app.exception_handler(Stopped)
    async def stopped(request: Request, error: Stopped) -> JSONResponse:
        del request, error
        return error_response(STOPPED)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        del request, error
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        del request
        return error_response(_field_error(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        messages = {
            404: f"there is no {path}; this server has /v1/models, /v1/completions and /v1/chat/completions.",
            405: f"{path} does not take {request.method}.",
            408: "the body did not come in time (--idle_seconds).",
            413: str(TOO_LARGE),
        }
        message = messages.get(error.status_code, str(error.detail))
        return error_response(ApiError(error.status_code, message))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        del request
        logging.getLogger(__name__).error("a request failed: %s", type(error).__name__)
        return error_response(ApiError(500, "the server made a mistake; its log says more."))


def _field_error(problem: Any) -> ApiError:
    """Pydantic's first complaint as one sentence that names the field."""
    where = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['ctx']['error']} at character {where[0]}.")
    if not where and problem["type"] in ("model_attributes_type", "missing", "bytes_type"):
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json.")
    name = ".".join(where)
    reasons = {"extra_forbidden": "is not known to this server", "missing": "is needed"}
    reason = reasons.get(problem["type"], str(problem["msg"]))
    return ApiError(400, f"{name}: {reason}." if name else f"{reason}.", param=name or None)


def _check_model(name: str, service: Service) -> None:
    if name != service.name:
        raise ApiError(
            404,
            f"there is no model {name!r} here; this server has {service.name!r}.",
            code="model_not_found",
            param="model",
        )


async def _answer(
    request: Request, body: Body, form: Form, service: Service, vocabulary: Vocabulary, readers: Readers
) -> Response:
    """Answers a checked body, whole or as a stream; a client that hangs up costs nothing more."""
    _check_model(body.model, service)
    service.worker.check_room(1)
    order = await readers.order_of(body, service, vocabulary)
    writing = Writing(order, service, vocabulary)
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(_events(writing, form, with_usage=with_usage), close=writing.close)
    try:
        return JSONResponse(await _while_connected(request, _whole(writing, form)))
    finally:
        writing.close()


class Writing:
    """The answers to an order, being written. `close` must be called."""

    def __init__(self, order: Order, service: Service, vocabulary: Vocabulary) -> None:
        self.order = order
        self._service = service
        self._vocabulary = vocabulary
        self._generated = order.generated
        work = [order.requests[index] for index in self._generated]
        scorings = []
        if order.scores_prompts:
            # Two numbers of alternatives, so two programs: one is all that loglikelihood tasks ask for.
            most = 1 if (order.alternatives or 0) <= 1 else service.limits.alternatives
            scorings = [Scoring(prompt.tokens, most) for prompt in order.prompts]
        service.worker.check_room(len(work) + len(scorings))
        self._scorings = Answers(service.worker, scorings)
        self._answers = Answers(service.worker, work)

    def close(self) -> None:
        """Forgets what is not done."""
        self._scorings.close()
        self._answers.close()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece) as they come; a choice's last piece has its finish_reason."""
        order = self.order
        scores: dict[int, PromptScores] = {}
        async for number, event in self._scorings:
            assert isinstance(event, PromptScores)
            scores[number] = event
        writers = []
        for index, request in enumerate(order.requests):
            prompt = order.prompts[index // order.n]
            prompt_scores = scores.get(index // order.n)
            writers.append(self._writer(request, offset=len(prompt.text)))
            if order.echo:
                echo = echo_piece(prompt, prompt_scores, self._vocabulary, alternatives=order.alternatives)
                yield index, echo
            if request.max_new_tokens == 0:
                yield index, Piece("", [], finish_reason="length")
            elif not order.is_generated(request):
                assert prompt_scores is not None
                yield index, writers[index].piece(scored_update(request, prompt_scores))
        async for number, event in self._answers:
            assert isinstance(event, Update)
            yield self._generated[number], writers[self._generated[number]].piece(event)

    def _writer(self, request: EngineRequest, *, offset: int) -> Writer:
        return Writer(
            self._service.tokenizer,
            self._vocabulary,
            request,
            alternatives=self.order.alternatives,
            offset=offset,
        )

    def usage(self, completion_tokens: int) -> JsonObject:
        """The counts."""
        return usage(sum(len(prompt.tokens) for prompt in self.order.prompts), completion_tokens)


async def _whole(writing: Writing, form: Form) -> JsonObject:
    """The response in one piece."""
    parts: list[list[Piece]] = [[] for _ in writing.order.requests]
    async for index, piece in writing.pieces():
        parts[index].append(piece)
    pieces = [join(part) for part in parts]
    body = form.body([form.choice(index, piece) for index, piece in enumerate(pieces)], chunk=False)
    return {**body, "usage": writing.usage(sum(piece.count for piece in pieces))}


async def _events(writing: Writing, form: Form, *, with_usage: bool) -> AsyncIterator[str]:
    """The response as server-sent events. Its status is sent by then, so an error is an event too."""
    count = 0
    try:
        openings = [form.opening(index) for index in range(len(writing.order.requests))]
        for choice in openings:
            if choice is not None:
                yield _event(_chunk(form, [choice], with_usage=with_usage))
        async for index, piece in writing.pieces():
            count += piece.count
            for choice in form.chunk(index, piece):
                yield _event(_chunk(form, [choice], with_usage=with_usage))
        if with_usage:
            yield _event({**form.body([], chunk=True), "usage": writing.usage(count)})
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
    """Server-sent events; `close` is called when the last one is sent or the client has hung up."""

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


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of the work, unless the client hangs up first (then ClientGone, and the work is cancelled)."""
    task = asyncio.ensure_future(work)
    hung_up = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        hung_up.cancel()
        task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
