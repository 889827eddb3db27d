"""Bodies of requests to engine requests: images are fetched, prompts encoded, grammars compiled."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from l4jax.engine.request import Constraints, SamplingParams
from l4jax.inputs import InputProcessor
from l4jax.server.errors import ApiError, convert_value_error
from l4jax.server.handle import EngineRequest
from l4jax.server.media import MediaReader
from l4jax.server.protocol import Conversation
from l4jax.text.chat import Prompt

THREADS = 4  # that render templates, tokenize, decode and resize images

T = TypeVar("T")


class Preprocessor:
    """Runs an `InputProcessor` on threads, so that the event loop stays responsive.

    Args:
        inputs: the model's.
        media: fetches images.
        trusts_templates: run chat templates of requests.
    """

    def __init__(self, inputs: InputProcessor, media: MediaReader, *, trusts_templates: bool):
        self.inputs, self._media, self._trusts_templates = inputs, media, trusts_templates
        # Imports the renderer of templates, on one thread: two that import it at once fail.
        inputs.tokenizer.render([{"role": "user", "content": ""}], template="-")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="preprocess")

    async def run(self, call: Callable[[], T], param: str) -> T:
        """Run a call on a thread; its `ValueError` becomes a 400 for the field `param`."""
        with convert_value_error(param):
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def encode_text(self, text: str, *, add_special_tokens: bool) -> Prompt:
        """Encode a raw prompt."""
        encode = self.inputs.encode_text
        return await self.run(lambda: encode(text, add_special_tokens=add_special_tokens), "prompt")

    async def render(self, conversation: Conversation, *, has_tools: bool) -> Prompt:
        """Render and encode a conversation with its images; the tools only if `has_tools`."""
        if conversation.chat_template is not None and not self._trusts_templates:
            raise ApiError(
                400,
                "chat_template: templates of requests are not run here "
                "(--trust-request-chat-template).",
                param="chat_template",
            )
        messages = await self._media.read_messages(_rename_roles(conversation.messages))
        tools = [tool.model_dump(exclude_none=True) for tool in conversation.tools or ()]
        prompt = await self.run(
            lambda: self.inputs.render_messages(
                messages,
                chat_template=conversation.chat_template,
                add_generation_prompt=conversation.add_generation_prompt,
                tools=tools if has_tools and tools else None,
            ),
            "messages",
        )
        if conversation.continue_final_message:
            return self._open_final_message(conversation, prompt)
        return prompt

    async def make_requests(
        self, prompts: list[Prompt], params: SamplingParams
    ) -> list[EngineRequest]:
        """Make n engine requests per prompt; request i is for prompt i // n."""
        return [
            EngineRequest(prompt.token_ids, single, prompt.images, await self._constrain(single))
            for prompt in prompts
            for single in params.split()
        ]

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _constrain(self, params: SamplingParams) -> Constraints | None:
        """Compile constraints for one completion, whose tokens advance their state."""
        if params.structured_outputs is None and not params.bad_words:
            return None
        make = self.inputs.make_constraints
        return await self.run(lambda: make(params), "structured_outputs")

    def _open_final_message(self, conversation: Conversation, prompt: Prompt) -> Prompt:
        """Drop the end-of-turn token after the final message, which must be the assistant's."""
        if conversation.messages[-1].get("role") != "assistant":
            raise ApiError(
                400,
                "continue_final_message: the last message is not the assistant's.",
                param="continue_final_message",
            )
        ids = prompt.token_ids
        end = ids[-1:] if ids and ids[-1] in self.inputs.eos_ids else ()
        return Prompt(ids[: len(ids) - len(end)], prompt.images)


def _rename_roles(messages: list[dict]) -> list[dict]:
    """Rename OpenAI's role `developer` to `system`, which Llama knows."""
    return [
        {**message, "role": "system"} if message.get("role") == "developer" else message
        for message in messages
    ]
