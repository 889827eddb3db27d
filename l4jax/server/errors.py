"""What goes wrong, in OpenAI's error shape: a sentence, the field at fault, and a status."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

CLIENT_GONE = 499  # nginx's code for a client that hung up: seen in the log only

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# Errors begin with the field where there is one: "top_p is 7.0: ...", "messages[0].role: ...".
_VERBS = "is|are|has|holds?|must|names|needs?|takes?"
_FIELD = re.compile(rf"^([a-z_]+(?:\[\d+\]|\.\w+)*)(?=:| (?:{_VERBS})\b)")


class ApiError(HTTPException):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: a sentence that names the value and the way out.
        param: the field at fault.
        code: a word for programs, such as "model_not_found".
        headers: of the answer.
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
        """`{"error": {...}}`, as OpenAI's clients read it."""
        return make_body(self.status_code, self.detail, self.param, self.code)


def make_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@contextlib.contextmanager
def refuse_in_words(param: str | None) -> Iterator[None]:
    """Turn a `ValueError` of the product, whose message is meant for the caller, into a 400.

    Args:
        param: the field at fault, where the message does not begin with one.
    """
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error), param=find_field(str(error)) or param) from error


def find_field(message: str) -> str | None:
    """The field that a message begins with."""
    found = _FIELD.match(message)
    return found[1] if found else None


def parse_json(raw: bytes) -> Any:
    """A JSON text, without the `NaN` and `Infinity` that Python reads and JSON does not have."""

    def refuse(name: str) -> Any:
        raise ApiError(400, f"The body holds {name}, which JSON does not have: send a number.")

    try:
        return json.loads(raw, parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "The body is nested too deep: flatten it.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from error


def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """An `ApiError`, or what the router says of a path or method that is not there."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        body = error.body
    elif error.status_code == 404:
        message = f"There is no {request.url.path}: see /openapi.json for what there is."
        body = make_body(404, message, code="not_found")
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}: see the header Allow."
        body = make_body(405, message, code="method_not_allowed")
    else:
        body = make_body(error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, error.headers)


def answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body of wrong types: the first field at fault, in words. What was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, ValueError) and not place:  # a law between fields: it names them
        message, param = f"{reason}.", find_field(str(reason))
    elif not place:
        message, param = "The body must be a JSON object, sent as application/json.", None
    elif first["type"] == "extra_forbidden":
        param = spell_place(place)
        message = f"{param} is not known to this server: leave it out."
    else:
        param = spell_place(place)
        message = f"{param}: {reason or first['msg']}."
    return JSONResponse(make_body(400, message, param), 400)


def spell_place(place: list[str | int]) -> str:
    """`["messages", 0, "role"]` as `messages[0].role`; names of union members are left out."""
    spelled = ""
    for part in place:
        if isinstance(part, int):
            spelled += f"[{part}]"
        elif re.fullmatch(r"\w+", part) and part not in _TYPES:
            spelled += f".{part}" if spelled else part
    return spelled


# Members of unions, which pydantic puts into the place of an error.
_TYPES = {"str", "dict", "NamedChoice", "TokenizeChat", "TokenizePrompt"}
