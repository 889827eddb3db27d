"""Schedule, run, take note: the engine is a loop of these three."""

import dataclasses
import itertools
import random

from l4jax.engine.request import Request, SamplingParams, TokenLogprobs
from l4jax.engine.runner import Runner
from l4jax.engine.scheduler import Limits, Scheduler
from l4jax.text.chat import PromptError
from l4jax.text.image import Tiles


@dataclasses.dataclass(frozen=True)
class Update:
    """What a step brought for one request."""

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None  # "stop", "length", or None while it goes on


class Engine:
    """Requests in, tokens out, on a runner that has its weights and its pool."""

    def __init__(self, runner: Runner, limits: Limits, seed: int = 0, max_images: int = 10):
        self.runner, self.limits, self.max_images = runner, limits, max_images
        self.scheduler = Scheduler(limits)
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count()
        self._seeds = random.Random(seed)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._requests)

    def add(
        self,
        token_ids: list[int] | tuple[int, ...],
        params: SamplingParams,
        images: tuple[Tiles, ...] = (),
    ) -> int:
        """Take a request; its id. Raises `PromptError` for a prompt that cannot be run."""
        self.check(token_ids, images)
        room = self.limits.max_length - len(token_ids)
        eos_ids = () if params.ignore_eos else self.runner.config.eos_ids
        request = Request(
            id=next(self._ids),
            tokens=list(token_ids),
            prompt_length=len(token_ids),
            max_length=len(token_ids) + min(room, params.max_tokens or room),
            params=params,
            seed=self._seeds.getrandbits(32) if params.seed is None else params.seed,
            stop_ids=tuple(dict.fromkeys([*eos_ids, *(params.stop_token_ids or ())])),
            images=images,
        )
        self._requests[request.id] = request
        self.scheduler.add(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """Drop a request at any moment, and free what it owns. One that has ended is left alone."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.scheduler.end(request)

    def step(self) -> list[Update]:
        """Run what is next, and say what it brought."""
        plan = self.scheduler.plan()
        if plan is None:
            return []
        updates = []
        for request, tokens, logprobs in self.runner.run(plan):
            tokens = _cut_at_stop(tokens, request.stop_ids)
            logprobs = logprobs[: len(tokens)]
            if request.feature_slots:
                self.scheduler.free_features(request)
            request.take(tokens, logprobs)
            updates.append(Update(request.id, tokens, logprobs, request.finish_reason))
            if request.finish_reason is not None:
                self.cancel(request.id)
        return updates

    def check(self, token_ids: list[int] | tuple[int, ...], images: tuple[Tiles, ...] = ()) -> None:
        """Raise `PromptError` for a prompt that cannot be run."""
        config, longest = self.runner.config, self.limits.max_length
        if not token_ids:
            raise PromptError("the prompt is empty: give at least one token.")
        if len(token_ids) >= longest:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, and with the answer {longest} fit: "
                f"shorten it to {longest - 1}, or raise max_model_len."
            )
        strangers = [token for token in token_ids if not 0 <= token < config.text.vocab]
        if strangers:
            raise PromptError(
                f"token id {strangers[0]} is not in the vocabulary of {config.text.vocab}."
            )
        if images and config.vision is None:
            raise PromptError("the prompt holds an image, and this model only reads text.")
        if len(images) > self.max_images:
            raise PromptError(
                f"the prompt holds {len(images)} images, and {self.max_images} are allowed."
            )
        wanted = sum(len(image.pixels_ICHW) for image in images) * (
            config.vision.features if config.vision else 0
        )
        found = list(token_ids).count(config.patch_id) if config.patch_id is not None else 0
        if wanted != found:
            raise PromptError(
                f"the prompt has {found} image tokens (id {config.patch_id}) "
                f"for {wanted} image features."
            )


def _cut_at_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Up to the first stop id: the device watches for the first few of them only."""
    for at, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: at + 1]
    return tokens
