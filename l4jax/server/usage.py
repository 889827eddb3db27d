"""Tokens of a request, as they add up."""

import dataclasses

from l4jax.server.protocol import PromptDetails, Usage


@dataclasses.dataclass
class UsageCounter:
    """Counts of tokens.

    Attributes:
        prompt_tokens: of all prompts, each counted once however many answers it gets.
        completion_tokens: of all answers.
        cached_tokens: of the prompts, those that the prefix cache held.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def spell(self) -> Usage:
        """As OpenAI reports it."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=self.cached_tokens),
        )
