"""Errors as the client reads them: OpenAI's error object, and which exception becomes which status."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from posttrain_jax.core.errors import InputError
from posttrain_jax.serving.forms import JsonObject
from posttrain_jax.serving.worker import Full, Stopped


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
    """The client disconnected; nobody reads the response."""


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


def handle_errors(app: FastAPI) -> None:
    """Makes every exception of a request an error response."""

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
