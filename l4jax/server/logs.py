"""The log: one JSON object a line, on standard error. No prompt and no answer gets into it.

Errors of the server are logged by their type and place, since their words may quote a prompt.
`--enable-log-requests` logs the bodies of requests, and is the one way to have them.
"""

import datetime
import io
import json
import logging
import sys
import traceback
from typing import Any

from starlette.types import Scope

_NOTES = "l4jax.notes"
# What every record has, and uvicorn's events with colors: the rest is `extra`.
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime",
    "color_message",
    "message",
    "taskName",
}


class JsonLines(logging.Formatter):
    """A record as an object: time, level, logger, event, and what `extra` brought."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
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
            line["trace"] = spell_trace(record.exc_info[1])
        return json.dumps(line, default=str)


def configure_logs(level: str) -> None:
    """Send the logs of l4jax and uvicorn to standard error, from a level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("l4jax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


class LineLog(io.TextIOBase):
    """A text stream whose lines become records; of a line that a progress bar rewrites, the last.

    Args:
        logger: where they go.
    """

    def __init__(self, logger: logging.Logger):
        self._logger, self._rest = logger, ""

    def write(self, text: str) -> int:
        """Take text, and log the lines that it completes."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._logger.info(line.rsplit("\r", 1)[-1])
        return len(text)


def spell_trace(error: BaseException) -> list[str]:
    """The type of an error and where it came from, innermost last, without its words."""
    frames = traceback.extract_tb(error.__traceback__)
    return [*(f"{f.filename}:{f.lineno} {f.name}" for f in frames), type(error).__name__]


def note(scope: Scope, **facts: Any) -> None:
    """Add facts to the line that the access log writes of a request."""
    scope.setdefault(_NOTES, {}).update(facts)


def read_notes(scope: Scope) -> dict[str, Any]:
    """The facts noted of a request."""
    return scope.setdefault(_NOTES, {})
