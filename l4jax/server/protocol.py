"""Requests and responses of OpenAI's API, with vLLM's additions.

Types are strict: "0.5" is not a number. An unknown field is refused by name, since dropping it
silently would change the result. `Harmless` has the exceptions: fields that clients send and that
cannot change a result here.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

INT32_MAX = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
Count = Annotated[int, Field(le=INT32_MAX)]


def _require_false(value: bool) -> bool:
    if value:
        raise ValueError("it can only be false here")
    return value


# Not Literal[False]: 0 equals it, and is no boolean.
Never = Annotated[bool, AfterValidator(_require_false), WithJsonSchema({"const": False})]


class Strict(BaseModel):
    """A body without unknown fields, conversions of types, and NaN."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Harmless(Strict):
    """Accepted and unused: labels of the client, and vLLM's switches with their only value here."""

    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    priority: Annotated[int, Field(ge=0, le=0)] = 0
    use_beam_search: Never = False
    spaces_between_special_tokens: bool | None = None


class StreamOptions(Strict):
    """Additional content of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; OpenAI's clients may send it


class JsonSchema(Strict):
    """A named JSON schema."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's constraint to JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> "ResponseFormat":
        has_schema = self.json_schema is not None and self.json_schema.schema_ is not None
        if (self.type == "json_schema") != has_schema:
            raise ValueError("type 'json_schema' and json_schema.schema come together")
        return self


class StructuredOutputs(Strict):
    """vLLM's constraint of the text; exactly one of the fields."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(Harmless):
    """Sampling parameters; `SamplingParams` checks their ranges."""

    model: str | None = None
    n: int = Field(default=1, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    min_tokens: Count | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    bad_words: list[str] | None = None
    prompt_logprobs: Count | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_tokens_as_token_ids: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _require_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream = true")
        return self


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only type."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    """The name of a forced function."""

    name: str


class NamedChoice(Strict):
    """A `tool_choice` that forces one function."""

    type: Literal["function"]
    function: FunctionName


class Conversation(Strict):
    """Input of the chat template."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None

    @model_validator(mode="after")
    def _forbid_prompt_after_open_message(self) -> "Conversation":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt = false")
        return self


class ChatRequest(Conversation, Sampling):
    """`POST /v1/chat/completions`."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = Field(default=None, ge=0)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None

    @model_validator(mode="after")
    def _check_logprobs_and_tools(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedChoice):
            named = self.tool_choice.function.name
            if named not in [tool.function.name for tool in self.tools or ()]:
                raise ValueError(f"tool_choice names {named!r}, which is not among the tools")
        return self


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Count | None = Field(default=16, ge=0)
    logprobs: Count | None = Field(default=None, ge=0)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "CompletionRequest":
        if self.suffix:
            raise ValueError("suffix is not supported: Llama 4 was not trained to fill gaps")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported: ask for n answers and choose among them")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0: it must be at least 1 unless echo is true")
        return self


class TokenizePrompt(Strict):
    """`POST /tokenize` with a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation):
    """`POST /tokenize` with a conversation."""

    model: str | None = None
    add_special_tokens: Never = False
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


class Description(BaseModel):
    """An error, with the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: Description


class Model(BaseModel):
    """An entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "l4jax"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class PromptDetails(BaseModel):
    """Details of prompt tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenizeResponse(BaseModel):
    """Response of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TokenizerInfo(BaseModel):
    """`GET /tokenizer_info`."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None


class DetokenizeResponse(BaseModel):
    """Response of `/detokenize`."""

    prompt: str


class TopLogprob(BaseModel):
    """A likely token with its bytes: a token may be half a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A chosen token, and the likeliest tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat completion."""

    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    """A call; `arguments` is JSON in a string."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call with the id that the tool's message repeats."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """The message of a chat completion."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    """One chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None


class ChatResponse(BaseModel):
    """`chat.completion`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the completions format: four lists of one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionResponse(BaseModel):
    """`text_completion`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
