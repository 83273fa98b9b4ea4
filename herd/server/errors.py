"""What goes wrong, as HTTP: statuses in one place, bodies in the shape of the API that was called. No torch."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from starlette.responses import JSONResponse

from herd.errors import (
    CheckpointError,
    ConfigError,
    ContextFullError,
    HerdError,
    HubError,
    PromptError,
    TokenizerError,
    UnknownModelError,
)
from herd.server.logs import frames
from herd.server.process import WorkerError

__all__ = ["ApiError", "Shape", "api_error", "error_body", "error_response", "shape_of", "told"]

log = logging.getLogger("herd.server")

Shape = Literal["openai", "anthropic", "ollama"]

STATUS: dict[str, tuple[int, str, str | None]] = {
    # the name of an error: status, OpenAI's type, OpenAI's code
    "ContextFullError": (400, "invalid_request_error", "context_length_exceeded"),
    "PromptError": (400, "invalid_request_error", "invalid_prompt"),
    "TokenizerError": (400, "invalid_request_error", "invalid_prompt"),
    "ConfigError": (400, "invalid_request_error", "invalid_value"),
    "UnknownModelError": (404, "invalid_request_error", "model_not_found"),
    "HubError": (502, "server_error", "download_failed"),
    "CheckpointError": (503, "server_error", "model_not_loaded"),
    "ConfigFileError": (503, "server_error", "model_not_loaded"),
    "TokenizerFileError": (503, "server_error", "model_not_loaded"),
    "Stopped": (503, "server_error", "model_unloaded"),
    "Crashed": (503, "server_error", "model_crashed"),
    "RanksError": (503, "server_error", "model_crashed"),
    "NotLoaded": (503, "server_error", "model_not_loaded"),
}
"""Anything else is 500. Names and not classes: most of these happen in another process."""
_CLASSES = (ContextFullError, UnknownModelError, HubError, CheckpointError, PromptError, TokenizerError, ConfigError)

_ANTHROPIC = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
              413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error"}  # fmt: skip
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "invalid_request_error",
          429: "rate_limit_error"}  # fmt: skip


class ApiError(HerdError):
    """A refusal with its status. `param` names the field; `retry_after` (seconds) is when to try again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.retry_after = retry_after


def api_error(error: BaseException) -> ApiError:
    """Any error as a refusal: its own status for a HerdError, 500 without details for what is a bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, WorkerError):
        kind = error.kind
    else:
        kind = next((cls.__name__ for cls in _CLASSES if isinstance(error, cls)), type(error).__name__)
    status, type_, code = STATUS.get(kind, (500, "server_error", "internal_error"))
    if kind == "Bug" or not isinstance(error, HerdError):
        return ApiError(500, "this is a bug in herd: the server's log says more", type=type_, code=code)
    retry = 1.0 if status == 503 else None
    return ApiError(status, str(error), type=type_, param=_param(kind), code=code, retry_after=retry)


def told(error: BaseException, where: str) -> ApiError:
    """The refusal that tells a client of `error`, which happened in `where`; what is the server's fault is logged.

    Messages of errors that nobody foresaw can repeat what a request says: of these, the log has the kind and the places.
    """
    refusal = api_error(error)
    if refusal.status >= 500 and refusal.code != "server_busy":  # many of those are no fault; they are counted
        kind = error.kind if isinstance(error, WorkerError) else type(error).__name__
        if isinstance(error, ApiError) or STATUS.get(kind, (500,))[0] > 500:
            log.error("%s: %s: %s", where, kind, error)
        else:
            log.error("%s: %s (%s)", where, kind, " < ".join(frames(error)) or "nothing is known of the place")
    return refusal


def _param(kind: str) -> str | None:
    return {"UnknownModelError": "model", "ContextFullError": "messages"}.get(kind)


def shape_of(path: str) -> Shape:
    """Whose API a path belongs to."""
    if path.startswith("/api/"):
        return "ollama"
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def error_body(error: ApiError, shape: Shape) -> dict[str, Any]:
    """The JSON of a refusal."""
    if shape == "ollama":
        return {"error": error.message}
    if shape == "anthropic":
        kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ApiError, shape: Shape) -> JSONResponse:
    """The answer to a request that was refused before anything was sent."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error, shape), error.status, headers)
