"""`POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`."""

from l4jax.server.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChat,
    TokenizePrompt,
    TokenizeResponse,
    TokenizerInfo,
)
from l4jax.server.service import Service


async def tokenize(service: Service, body: TokenizePrompt | TokenizeChat) -> TokenizeResponse:
    """Return the token ids of a text or of a conversation."""
    service.get_model(body.model)
    preprocessor = service.preprocessor
    with service.reserve_one():
        if isinstance(body, TokenizePrompt):
            special = body.add_special_tokens
            prompt = await preprocessor.encode_text(body.prompt, add_special_tokens=special)
        else:
            prompt = await preprocessor.render(body, has_tools=bool(body.tools))
    tokens, to_bytes = list(prompt.token_ids), service.tokenizer.token_bytes
    texts = None
    if body.return_token_strs:
        texts = [to_bytes(token).decode(errors="replace") for token in tokens]
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=service.max_model_len,
        tokens=tokens,
        token_strs=texts,
    )


async def detokenize(service: Service, body: DetokenizeRequest) -> DetokenizeResponse:
    """Return the text of token ids, including special tokens."""
    service.get_model(body.model)
    decode = service.tokenizer.decode
    with service.reserve_one():
        text = await service.preprocessor.run(
            lambda: decode(body.tokens, skip_special_tokens=False), "tokens"
        )
    return DetokenizeResponse(prompt=text)


def describe_tokenizer(service: Service) -> TokenizerInfo:
    """Return special tokens and template, for clients that render conversations themselves."""
    names = service.tokenizer.special_tokens_map
    template = service.preprocessor.inputs.chat_template or service.tokenizer.chat_template
    return TokenizerInfo(**names, chat_template=template)
