"""What the endpoints share: the model, its engine's thread, and the way from a prompt to pieces."""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from l4jax.engine.request import Constraints, SamplingParams
from l4jax.llm import LLM
from l4jax.outputs import CompletionBuilder, CompletionDelta
from l4jax.server.errors import ApiError, refuse_in_words
from l4jax.server.loop import BusyError, ClosedError, EngineLoop, RequestHandle, Work
from l4jax.server.media import MediaReader
from l4jax.server.metrics import Metrics
from l4jax.server.options import Options
from l4jax.server.protocol import Conversation
from l4jax.server.usage import UsageCounter
from l4jax.text.chat import Prompt
from l4jax.text.tokenizer import Tokenizer

READERS = 4  # threads that render templates, tokenize, and decode and cut pictures
RETRY_SECONDS = 1  # when to ask a full server again

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of one of a request's answers, and what its prompt brought along."""

    index: int
    piece: CompletionDelta
    prompt_logprobs: list | None


class Service:
    """A model behind HTTP.

    Args:
        llm: nobody else may use its engine from now on.
        options: of the server.
        defaults: where a request leaves a sampling parameter out.
        media: reads pictures; None makes one that keeps to `options.media`.
    """

    def __init__(
        self,
        llm: LLM,
        options: Options,
        defaults: SamplingParams,
        media: MediaReader | None = None,
    ):
        self.llm, self.options, self.defaults = llm, options, defaults
        # Imports the renderer of templates, on one thread: two that import it at once fail.
        llm.tokenizer.render([{"role": "user", "content": ""}], template="-")
        self.created = int(time.time())
        self.metrics = Metrics(options.served_model_names[0])
        limits = llm.engine.limits
        self.loop = EngineLoop(
            llm.engine, limits.requests * limits.shards + options.max_waiting, self.metrics
        )
        self.metrics.watch(lambda: self.loop.stats)
        self._media = media or MediaReader(options.media)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        return self.llm.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.llm.engine.limits.max_length

    def find_model(self, name: str | None) -> str:
        """The name to answer under: the asked one, which has to be served, or the first."""
        names = self.options.served_model_names
        if name is not None and name not in names:
            raise ApiError(
                404,
                f"The model {name[:100]!r} is not served here: it is {' or '.join(names)}.",
                param="model",
                code="model_not_found",
            )
        return name or names[0]

    def reserve(self, count: int) -> RequestHandle:
        """A place for so many answers, or the error that says when to ask again."""
        if count > self.loop.capacity:
            raise ApiError(
                400,
                f"n is {count} over all prompts: at most {self.loop.capacity} answers fit.",
                param="n",
            )
        try:
            return self.loop.reserve(count)
        except BusyError:
            raise ApiError(
                429,
                f"{self.loop.capacity} requests are in flight, which is all that may be "
                f"(--max-num-seqs and --max-waiting): ask again in {RETRY_SECONDS} s.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(RETRY_SECONDS)},
            ) from None
        except ClosedError as error:
            raise make_closed(error) from None

    @contextlib.contextmanager
    def hold_place(self) -> Iterator[None]:
        """A place for what is not answered by the engine, and takes its time all the same."""
        ticket = self.reserve(1)
        try:
            yield
        finally:
            ticket.close()

    async def read(self, call: Callable[[], T], param: str) -> T:
        """Do what takes long away from the event loop; its `ValueError` is the caller's."""
        with refuse_in_words(param):
            return await asyncio.get_running_loop().run_in_executor(self._readers, call)

    async def render(self, talk: Conversation, has_tools: bool) -> Prompt:
        """A conversation as the model reads it, pictures and all."""
        if talk.chat_template is not None and not self.options.trusts_request_templates:
            raise ApiError(
                400,
                "chat_template: templates of requests are not run here "
                "(--trust-request-chat-template).",
                param="chat_template",
            )
        messages = await self._media.read_messages(_rename_roles(talk.messages))
        tools = [tool.model_dump(exclude_none=True) for tool in talk.tools or ()]
        prompt = await self.read(
            lambda: self.llm.inputs.render_messages(
                messages,
                chat_template=talk.chat_template,
                add_generation_prompt=talk.add_generation_prompt,
                tools=tools if has_tools and tools else None,
            ),
            "messages",
        )
        return self._open_last(talk, prompt) if talk.continue_final_message else prompt

    async def spell(self, text: str, adds_special_tokens: bool) -> Prompt:
        """A raw prompt as the model reads it."""
        encode = self.llm.inputs.encode_text
        return await self.read(
            lambda: encode(text, add_special_tokens=adds_special_tokens), "prompt"
        )

    async def start(
        self, ticket: RequestHandle, prompts: list[Prompt], params: SamplingParams, param: str
    ) -> list[CompletionBuilder]:
        """Hand n requests a prompt to the engine; the answers that their updates fill.

        Answer i is for prompt i // n. A refused prompt is the fault of the field `param`.
        """
        works = [
            Work(prompt.token_ids, single, prompt.images, await self._constrain(single))
            for prompt in prompts
            for single in params.split()
        ]
        try:
            with refuse_in_words(param):
                await ticket.start(works, self.options.request_timeout)
        except ClosedError as error:
            raise make_closed(error) from None
        return [CompletionBuilder(self.tokenizer, work.params) for work in works]

    async def _constrain(self, params: SamplingParams) -> Constraints | None:
        """What an answer must keep to: for one answer only, since it follows that answer."""
        if params.structured_outputs is None and not params.bad_words:
            return None
        return await self.read(
            lambda: self.llm.inputs.make_constraints(params), "structured_outputs"
        )

    async def follow(
        self, ticket: RequestHandle, answers: list[CompletionBuilder], tally: UsageCounter, n: int
    ) -> AsyncIterator[Part]:
        """What the engine brings, as pieces of text, until all answers have ended.

        Raises:
            ApiError: a step failed, a deadline passed, or the server shuts down.
        """
        begun, ended = [False] * len(answers), [False] * len(answers)
        while not all(ended):
            index, update = await ticket.receive()
            if ended[index]:
                continue
            if update.finish_reason in ("error", "abort"):
                ticket.end(index, update.finish_reason)
                raise self._make_failure(update.finish_reason)
            piece = answers[index].add(update)
            tally.completion_tokens += len(piece.token_ids)
            if not begun[index] and index % n == 0:  # the answers to a prompt share it
                tally.cached_tokens += update.cached_tokens
            begun[index] = True
            if piece.finish_reason is not None:
                ended[index] = True
                ticket.end(index, piece.finish_reason)
            yield Part(index, piece, update.prompt_logprobs)

    def close(self) -> None:
        """Let the readers go."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _make_failure(self, reason: str) -> ApiError:
        if reason == "error":
            return ApiError(500, "The model failed on this request: ask again.", code="engine")
        if self.loop.is_draining or not self.loop.is_alive:
            return make_closed(
                ClosedError("The server is shutting down: ask another one, or later.")
            )
        return ApiError(
            504,
            f"The answer took longer than {self.options.request_timeout:g} s (--request-timeout): "
            "ask for fewer tokens.",
            code="timeout",
        )

    def _open_last(self, talk: Conversation, prompt: Prompt) -> Prompt:
        if talk.messages[-1].get("role") != "assistant":
            raise ApiError(
                400,
                "continue_final_message: the last message is not the assistant's.",
                param="continue_final_message",
            )
        ids = prompt.token_ids
        end = ids[-1:] if ids and ids[-1] in self.llm.inputs.eos_ids else ()
        return Prompt(ids[: len(ids) - len(end)], prompt.images)


def make_closed(error: ClosedError) -> ApiError:
    return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "10"})


def make_id(kind: str) -> str:
    """A name for an answer, such as `chatcmpl-...`."""
    return f"{kind}-{uuid.uuid4().hex}"


def _rename_roles(messages: list[dict]) -> list[dict]:
    """OpenAI's newer word for the system's messages is `developer`; Llama knows `system`."""
    return [
        {**message, "role": "system"} if message.get("role") == "developer" else message
        for message in messages
    ]
