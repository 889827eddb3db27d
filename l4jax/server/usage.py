"""Token counts of a request, in responses and in streams."""

import dataclasses
from typing import Any

from l4jax.server.protocol import PromptDetails, StreamOptions, Usage


@dataclasses.dataclass
class UsageCounter:
    """Token counts of a request.

    Attributes:
        prompt_tokens: of all prompts, each counted once for its n completions.
        completion_tokens: of all completions.
        cached_tokens: prompt tokens found in the prefix cache.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_usage(self) -> Usage:
        """Return the counts in OpenAI's format."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=self.cached_tokens),
        )


@dataclasses.dataclass(frozen=True)
class StreamUsage:
    """Usage in a stream: in each chunk, in a final chunk, or nowhere."""

    in_each: bool
    has_final: bool

    @classmethod
    def from_options(cls, options: StreamOptions | None) -> "StreamUsage":
        """Read `stream_options`."""
        given = options or StreamOptions()
        return cls(given.include_usage and given.continuous_usage_stats, given.include_usage)

    def add(self, chunk: dict[str, Any], usage: UsageCounter) -> dict[str, Any]:
        """Add the usage so far to a chunk; null if only the final chunk has it."""
        if self.in_each:
            return chunk | {"usage": usage.to_usage().model_dump()}
        return chunk | {"usage": None} if self.has_final else chunk
