"""A model without weights, for what goes wrong around one: it writes "a", when it is told to."""

import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from l4jax import SamplingParams
from l4jax.engine.engine import RequestUpdate, Stats
from l4jax.inputs import InputProcessor
from l4jax.server.loop import EngineLoop
from l4jax.testing import write_tokenizer
from l4jax.text.chat import PromptError
from l4jax.text.tokenizer import Tokenizer

LETTER = ord("a")  # its token's id in the tiny tokenizer


class TypistEngine:
    """What `EngineLoop` calls, with one token a step for each request.

    Attributes:
        pace: steps wait while it is cleared.
        failure: raised by the next step that has work.
        cancelled: ids that were cancelled before they ended.
        threads: names of the threads that called.
    """

    is_compiling = False

    def __init__(self, requests: int = 2):
        self.limits = SimpleNamespace(requests=requests, shards=1, max_length=512)
        self.pace, self.failure = threading.Event(), None
        self.pace.set()
        self.cancelled: list[int] = []
        self.threads: set[str] = set()
        self.added: list[SamplingParams] = []
        self._ids = itertools.count()
        self._left: dict[int, int] = {}
        self._deadlines: dict[int, float] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def warm_up(self) -> None:
        self._note()

    def stats(self) -> Stats:
        values = dict.fromkeys(Stats.__dataclass_fields__, 0)
        return Stats(**{**values, "running": len(self._left), "pages": 10, "pages_used": 5})

    def add(self, token_ids, params, images, *, constraints=None, timeout=None) -> int:
        self._note()
        if len(token_ids) > 500:
            raise PromptError("the prompt is too long: shorten it.")
        request_id = next(self._ids)
        self.added.append(params)
        self._left[request_id] = params.max_tokens or 500
        self._deadlines[request_id] = time.monotonic() + (timeout or 1e9)
        return request_id

    def cancel(self, request_id: int) -> None:
        self._note()
        if self._left.pop(request_id, None) is not None:
            self.cancelled.append(request_id)

    def step(self) -> list[RequestUpdate]:
        self._note()
        self.pace.wait(0.05)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        updates = []
        for request_id in list(self._left):
            if time.monotonic() > self._deadlines[request_id]:
                del self._left[request_id]
                updates.append(RequestUpdate(request_id, [], [], "abort"))
            elif self.pace.is_set():
                self._left[request_id] -= 1
                reason = None if self._left[request_id] else "length"
                if reason:
                    del self._left[request_id]
                updates.append(RequestUpdate(request_id, [LETTER], [], reason))
        return updates

    def _note(self) -> None:
        self.threads.add(threading.current_thread().name)


def make_typist(folder: Path, requests: int = 2) -> Any:
    """What `Service` needs of an `LLM`."""
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return SimpleNamespace(
        tokenizer=tokenizer,
        inputs=InputProcessor(tokenizer),
        engine=TypistEngine(requests),
        get_default_sampling_params=SamplingParams,
    )


def wait_until(is_so: Any, seconds: float = 20.0) -> None:
    """Until a condition holds; fails if it does not come to."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.005)


def is_idle(loop: EngineLoop) -> bool:
    return not loop.count_in_flight() and not loop.stats.running
