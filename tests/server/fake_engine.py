"""A fake engine without weights, for tests of failures: it generates "a"."""

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

LETTER = ord("a")  # its token id in the tiny tokenizer


class FakeEngine:
    """The methods that `EngineLoop` calls; each step gives one token to each request.

    Attributes:
        pace: steps wait while it is cleared.
        failure: raised by the next step with work.
        cancelled: ids of requests that were cancelled before their end.
        threads: names of the calling threads.
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


def make_fake_llm(folder: Path, requests: int = 2) -> Any:
    """Make the attributes of an `LLM` that `Service` uses."""
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return SimpleNamespace(
        tokenizer=tokenizer,
        inputs=InputProcessor(tokenizer),
        engine=FakeEngine(requests),
        get_default_sampling_params=SamplingParams,
    )


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Wait until a condition holds; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not hold in time"
        time.sleep(0.005)


def is_idle(loop: EngineLoop) -> bool:
    return not loop.count_in_flight() and not loop.stats.running
