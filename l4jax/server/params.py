"""From the fields of a request to `SamplingParams`, on top of the model's defaults."""

from typing import Any

from l4jax.engine.request import SamplingParams, StructuredOutputsParams
from l4jax.server.errors import ApiError, refuse_in_words
from l4jax.server.options import Options
from l4jax.server.protocol import ChatRequest, CompletionRequest, Sampling

# Taken over as they are; those that are None are the default's.
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


def read_chat_params(
    request: ChatRequest,
    defaults: SamplingParams,
    options: Options,
    forced: dict[str, Any] | None,
) -> SamplingParams:
    """Settings of a chat.

    Args:
        request: as it came.
        defaults: of the model.
        options: of the server, which bound them.
        forced: the JSON schema that `tool_choice` demands, if it does.
    """
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        max_tokens = request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    check_logprobs("top_logprobs", logprobs, options.max_logprobs)
    return _read(request, defaults, options, forced, max_tokens=max_tokens, logprobs=logprobs)


def read_completion_params(
    request: CompletionRequest, defaults: SamplingParams, options: Options
) -> SamplingParams:
    """Settings of a completion; `echo` with `logprobs` asks for those of the prompt, too."""
    check_logprobs("logprobs", request.logprobs, options.max_logprobs)
    given: dict[str, Any] = {"logprobs": request.logprobs, "max_tokens": request.max_tokens}
    if request.max_tokens == 0:  # only the prompt is wanted, and running it brings one token
        given["max_tokens"] = 1
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        given["prompt_logprobs"] = request.logprobs
    return _read(request, defaults, options, None, **given)


def check_logprobs(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise ApiError(
            400, f"{name} is {value}: at most {limit} are reported (--max-logprobs).", param=name
        )


def _read(
    request: Sampling,
    defaults: SamplingParams,
    options: Options,
    forced: dict[str, Any] | None,
    **given: Any,
) -> SamplingParams:
    check_logprobs("prompt_logprobs", request.prompt_logprobs, options.max_logprobs)
    if options.max_new_tokens is not None:
        asked = given["max_tokens"]
        given["max_tokens"] = min(options.max_new_tokens, asked or options.max_new_tokens)
    values = {name: getattr(request, name) for name in _SAME} | {
        "logit_bias": _read_bias(request.logit_bias),
        "structured_outputs": _read_structure(request, forced),
    }
    values = {name: value for name, value in values.items() if value is not None}
    values |= {name: value for name, value in given.items() if value is not None}
    values.setdefault("max_tokens", None)  # as many as fit, where the default of offline use is 16
    with refuse_in_words(None):
        return defaults.replace(**values)


def _read_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    strange = [key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 10)]
    if strange:
        raise ApiError(
            400, f"logit_bias: {strange[0]!r} is not the id of a token.", param="logit_bias"
        )
    return {int(key): value for key, value in bias.items()}


def _read_structure(
    request: Sampling, forced: dict[str, Any] | None
) -> StructuredOutputsParams | None:
    """The one constraint that a request asks for, however it is spelled."""
    wanted: list[dict[str, Any]] = [{"json": forced}] if forced is not None else []
    response = request.response_format
    if response is not None and response.type == "json_object":
        wanted.append({"json_object": True})
    elif response is not None and response.json_schema is not None:
        wanted.append({"json": response.json_schema.schema_})
    if request.structured_outputs is not None:
        wanted.append(request.structured_outputs.model_dump(exclude_none=True, by_alias=True))
    older = ("json", "regex", "choice", "grammar")
    guided = {name: getattr(request, f"guided_{name}") for name in older}
    wanted += [{name: value} for name, value in guided.items() if value is not None]
    if not wanted:
        return None
    if len(wanted) > 1:
        raise ApiError(
            400,
            "The text is constrained twice: give one of response_format, structured_outputs, "
            "guided_json, guided_regex, guided_choice, guided_grammar, and a forced tool_choice.",
            param="structured_outputs",
        )
    with refuse_in_words("structured_outputs"):
        return StructuredOutputsParams(**wanted[0])
