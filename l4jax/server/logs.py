"""The log: one JSON object per line, on standard error. It contains no prompt and no completion.

Errors of the server are logged by type and location, since their messages may quote a prompt.
Only `--enable-log-requests` logs the bodies of requests.
"""

import datetime
import io
import json
import logging
import sys
import traceback
from typing import Any

from starlette.types import Scope

_FIELDS = "l4jax.log_fields"  # key of a scope
# Attributes of every record, and of uvicorn's colored events; all others are `extra`.
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime",
    "color_message",
    "message",
    "taskName",
}


class JsonLines(logging.Formatter):
    """Formats a record as an object: time, level, logger, event, and the `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _PLAIN}
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            line["trace"] = format_trace(record.exc_info[1])
        return json.dumps(line, default=str)


def configure_logs(level: str) -> None:
    """Send the logs of l4jax and uvicorn to standard error, from a level upwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("l4jax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


class LineLog(io.TextIOBase):
    """A text stream whose lines become records; a rewritten progress bar becomes its last state.

    Args:
        logger: of the records.
    """

    def __init__(self, logger: logging.Logger):
        self._logger, self._rest = logger, ""

    def write(self, text: str) -> int:
        """Append text, and log completed lines."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._logger.info(line.rsplit("\r", 1)[-1])
        return len(text)


def format_trace(error: BaseException) -> list[str]:
    """Format the frames of an error, innermost last, and its type, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    return [*(f"{f.filename}:{f.lineno} {f.name}" for f in frames), type(error).__name__]


def add_log_fields(scope: Scope, **fields: Any) -> None:
    """Add fields to the line of a request in the access log."""
    scope.setdefault(_FIELDS, {}).update(fields)


def get_log_fields(scope: Scope) -> dict[str, Any]:
    """Return the fields added for a request."""
    return scope.setdefault(_FIELDS, {})
