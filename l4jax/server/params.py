"""Sampling parameters of a request, with the model's defaults."""

from typing import Any

from l4jax.engine.request import SamplingParams, StructuredOutputsParams
from l4jax.server.errors import ApiError, convert_value_error
from l4jax.server.options import Options
from l4jax.server.protocol import ChatRequest, CompletionRequest, Sampling

# Fields with the same name and meaning; None is the default's value.
_SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "bad_words",
    "prompt_logprobs",
)


def make_chat_params(
    request: ChatRequest,
    defaults: SamplingParams,
    options: Options,
    forced: dict[str, Any] | None,
) -> SamplingParams:
    """Make the sampling parameters of a chat.

    Args:
        request: the body.
        defaults: of the model.
        options: of the server, with limits.
        forced: the JSON schema that `tool_choice` forces, or None.
    """
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        max_tokens = request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    check_logprobs("top_logprobs", logprobs, options.max_logprobs)
    return _make_params(
        request, defaults, options, forced, max_tokens=max_tokens, logprobs=logprobs
    )


def make_completion_params(
    request: CompletionRequest, defaults: SamplingParams, options: Options
) -> SamplingParams:
    """Make the sampling parameters of a completion; `echo` with `logprobs` scores the prompt."""
    check_logprobs("logprobs", request.logprobs, options.max_logprobs)
    given: dict[str, Any] = {"logprobs": request.logprobs, "max_tokens": request.max_tokens}
    if request.max_tokens == 0:  # only the prompt is requested; its last step samples one token
        given["max_tokens"] = 1
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        given["prompt_logprobs"] = request.logprobs
    return _make_params(request, defaults, options, None, **given)


def check_logprobs(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise ApiError(
            400, f"{name} is {value}: at most {limit} are reported (--max-logprobs).", param=name
        )


def _make_params(
    request: Sampling,
    defaults: SamplingParams,
    options: Options,
    forced: dict[str, Any] | None,
    **given: Any,
) -> SamplingParams:
    check_logprobs("prompt_logprobs", request.prompt_logprobs, options.max_logprobs)
    if options.max_new_tokens is not None:
        limit = options.max_new_tokens
        given["max_tokens"] = min(limit, given["max_tokens"] or limit)
    values = {name: getattr(request, name) for name in _SAME} | {
        "logit_bias": _parse_bias(request.logit_bias),
        "structured_outputs": _make_structured_outputs(request, forced),
    }
    values = {name: value for name, value in values.items() if value is not None}
    values |= {name: value for name, value in given.items() if value is not None}
    values.setdefault("max_tokens", None)  # as many as fit; LLM's default is 16
    with convert_value_error(None):
        return defaults.replace(**values)


def _parse_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    invalid = [key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 10)]
    if invalid:
        raise ApiError(
            400, f"logit_bias: {invalid[0]!r} is not the id of a token.", param="logit_bias"
        )
    return {int(key): value for key, value in bias.items()}


def _make_structured_outputs(
    request: Sampling, forced: dict[str, Any] | None
) -> StructuredOutputsParams | None:
    """Make the constraint of a request from any of its spellings; refuse two."""
    given: list[dict[str, Any]] = [{"json": forced}] if forced is not None else []
    response = request.response_format
    if response is not None and response.type == "json_object":
        given.append({"json_object": True})
    elif response is not None and response.json_schema is not None:
        given.append({"json": response.json_schema.schema_})
    if request.structured_outputs is not None:
        given.append(request.structured_outputs.model_dump(exclude_none=True, by_alias=True))
    older = ("json", "regex", "choice", "grammar")
    guided = {name: getattr(request, f"guided_{name}") for name in older}
    given += [{name: value} for name, value in guided.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ApiError(
            400,
            "The text is constrained twice: give one of response_format, structured_outputs, "
            "guided_json, guided_regex, guided_choice, guided_grammar, and a forced tool_choice.",
            param="structured_outputs",
        )
    with convert_value_error("structured_outputs"):
        return StructuredOutputsParams(**given[0])
