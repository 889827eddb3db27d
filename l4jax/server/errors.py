"""Errors in OpenAI's format: a sentence, the field at fault, and a status."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

CLIENT_GONE = 499  # nginx's code for a client that disconnected; appears in the log only

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# Messages begin with the field at fault, if there is one: "top_p is 7.0: ..."
_VERBS = "is|are|has|holds?|must|names|needs?|takes?"
_FIELD = re.compile(rf"^([a-z_]+(?:\[\d+\]|\.\w+)*)(?=:| (?:{_VERBS})\b)")


class ApiError(HTTPException):
    """An error response.

    Args:
        status: of HTTP.
        message: a sentence that names the value and the way out.
        param: the field at fault.
        code: for programs, such as "model_not_found".
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers) if headers else None)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The body in OpenAI's format, `{"error": {...}}`."""
        return make_body(self.status_code, self.detail, self.param, self.code)


def make_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Make the body of an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@contextlib.contextmanager
def convert_value_error(param: str | None) -> Iterator[None]:
    """Convert a `ValueError` of l4jax, whose message is meant for the client, into a 400.

    Args:
        param: the field at fault, if the message does not begin with one.
    """
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error), param=find_field(str(error)) or param) from error


def make_shutdown_error() -> ApiError:
    """Make the 503 of a server that shuts down."""
    message = "The server is shutting down: ask another one, or later."
    return ApiError(503, message, code="shutting_down", headers={"Retry-After": "10"})


def find_field(message: str) -> str | None:
    """Return the field that a message begins with."""
    found = _FIELD.match(message)
    return found[1] if found else None


def parse_json(raw: bytes) -> Any:
    """Parse JSON; refuse `NaN` and `Infinity`, which Python reads and JSON does not have."""

    def refuse(name: str) -> Any:
        raise ApiError(400, f"The body holds {name}, which JSON does not have: send a number.")

    try:
        return json.loads(raw, parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "The body is nested too deep: flatten it.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from error


def handle_http_error(request: Request, error: Exception) -> JSONResponse:
    """Format an `ApiError`, or the router's error for an unknown path or method."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        body = error.body
    elif error.status_code == 404:
        message = f"There is no {request.url.path}: see /openapi.json for all paths."
        body = make_body(404, message, code="not_found")
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}: see the header Allow."
        body = make_body(405, message, code="method_not_allowed")
    else:
        body = make_body(error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, error.headers)


def handle_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Name the first field at fault in a body of wrong types. Its value is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location = [part for part in first["loc"] if part != "body"]
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, ValueError) and not location:  # a rule between fields, which it names
        message, param = f"{reason}.", find_field(str(reason))
    elif not location:
        message, param = "The body must be a JSON object, sent as application/json.", None
    elif first["type"] == "extra_forbidden":
        param = format_location(location)
        message = f"{param} is not known to this server: leave it out."
    else:
        param = format_location(location)
        message = f"{param}: {reason or first['msg']}."
    return JSONResponse(make_body(400, message, param), 400)


def format_location(location: list[str | int]) -> str:
    """Format `["messages", 0, "role"]` as `messages[0].role`, without names of union members."""
    field = ""
    for part in location:
        if isinstance(part, int):
            field += f"[{part}]"
        elif re.fullmatch(r"\w+", part) and part not in _TYPES:
            field += f".{part}" if field else part
    return field


# Members of unions, which pydantic adds to the location of an error.
_TYPES = {"str", "dict", "NamedChoice", "TokenizeChat", "TokenizePrompt"}
