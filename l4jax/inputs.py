"""Inputs of `LLM` and of the server: prompts and messages to token ids and images, and defaults."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from l4jax.config import Config, ConfigError
from l4jax.engine.config import EngineConfig
from l4jax.engine.request import Constraints, SamplingParams
from l4jax.json_file import quote, read_object_if_present
from l4jax.text.chat import Prompt, PromptError, encode_prompt, render_chat
from l4jax.text.grammar import Grammar
from l4jax.text.image import ImageProcessor
from l4jax.text.tokenizer import Tokenizer
from l4jax.text.tokenizer_check import check_tokenizer

log = logging.getLogger(__name__)

# Keys of generation_config.json, and the sampling parameters that they set.
GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}

# Keys that change no answer, or only the choice among several of them.
_INERT = re.compile(
    r"do_sample|(bos|eos|pad)_token_id|transformers_version|_from_model_config|max_length|use_cache"
    r"|(cache|compile)_.*|disable_compile|return_.*|output_.*|max_time"
    r"|(num_)?assistant_.*|target_lookbehind|is_assistant|max_matching_ngram_size|prefill_chunk_size"
)

Messages: TypeAlias = Sequence[dict[str, Any]]
# Text, or {"prompt": text, "multi_modal_data": {"image": [...]}}, or {"prompt_token_ids": [...]}.
PromptLike: TypeAlias = str | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class InputProcessor:
    """Tokenizer, image processor and defaults of a checkpoint. Any thread may call it.

    Attributes:
        tokenizer: the checkpoint's.
        image_processor: the checkpoint's; None for a model that only reads text.
        eos_ids: token ids that end a completion.
        vocab: rows of the output head; ids beyond the tokenizer's are never allowed.
        chat_template: Jinja; None is the checkpoint's.
        max_images: images of a prompt, at most.
        generation_fields: sampling parameters that the checkpoint sets.
    """

    tokenizer: Tokenizer
    image_processor: ImageProcessor | None = None
    eos_ids: tuple[int, ...] = ()
    vocab: int = 0
    chat_template: str | None = None
    max_images: int = 10
    generation_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_folder(
        cls, folder: Path, config: Config, engine_config: EngineConfig
    ) -> "InputProcessor":
        """Read tokenizer, image processor and sampling defaults of a checkpoint."""
        image_processor = None
        if config.vision is not None:
            image_processor = ImageProcessor.from_folder(
                folder, image_size=config.vision.tile, patch_size=config.vision.patch
            )
        tokenizer = Tokenizer.from_folder(folder)
        check_tokenizer(tokenizer, config, folder)
        return cls(
            tokenizer=tokenizer,
            image_processor=image_processor,
            eos_ids=config.eos_ids or tokenizer.default_eos_ids,
            vocab=config.text.vocab,
            chat_template=engine_config.chat_template,
            max_images=engine_config.max_images,
            generation_fields=read_generation_config(folder),
        )

    @property
    def default_params(self) -> SamplingParams:
        """Sampling parameters for calls without any."""
        return SamplingParams(**self.generation_fields)

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """Encode a raw prompt without images; special tokens in the text count.

        Without `add_special_tokens` it is encoded as it is, without BOS.
        """
        if add_special_tokens:
            return encode_prompt(self.tokenizer, self.image_processor, text)
        return Prompt(tuple(self.tokenizer.encode(text, add_special_tokens=False)), ())

    def encode_prompt(self, prompt: PromptLike) -> Prompt:
        """Encode a prompt of `LLM.generate`.

        Raises:
            PromptError: for other keys, and for images that do not match the text.
        """
        if isinstance(prompt, str):
            return self.encode_text(prompt)
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "multi_modal_data"}
        if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
            raise PromptError(
                f"prompt: it has the keys {sorted(prompt)}; give 'prompt' or 'prompt_token_ids', "
                "and 'multi_modal_data' only with 'prompt'."
            )
        if "prompt_token_ids" in prompt:
            if prompt.get("multi_modal_data"):
                raise PromptError("prompt: images need 'prompt' as text, not 'prompt_token_ids'.")
            return Prompt(tuple(int(token) for token in prompt["prompt_token_ids"]), ())
        images = (prompt.get("multi_modal_data") or {}).get("image", ())
        images = list(images) if isinstance(images, list | tuple) else [images]
        return encode_prompt(self.tokenizer, self.image_processor, prompt["prompt"], images)

    def render_messages(
        self,
        messages: Messages,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
    ) -> Prompt:
        """Render a conversation with a chat template and encode it; see `text.chat.render_chat`."""
        return render_chat(
            self.tokenizer,
            self.image_processor,
            messages,
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            max_images=self.max_images,
        )

    def make_constraints(self, params: SamplingParams) -> Constraints:
        """Compile `structured_outputs` and `bad_words` for `Engine.add`, for one completion.

        Raises:
            ValueError: for a schema or a grammar that cannot be compiled.
        """
        matcher = None
        if params.structured_outputs is not None:
            wanted = params.structured_outputs
            grammar = Grammar.compile(
                self.tokenizer,
                wanted.kind,
                wanted.value,
                where=f"structured_outputs.{wanted.kind}",
            )
            stop_ids = (*self.eos_ids, *(params.stop_token_ids or ()))
            matcher = grammar.start(self.vocab, stop_ids)
        # A word is forbidden at the beginning of a text and after a space.
        forms = (form for word in params.bad_words or () for form in (word, f" {word.lstrip()}"))
        ids = (self.tokenizer.encode(text, add_special_tokens=False) for text in forms)
        return Constraints(tuple(dict.fromkeys(map(tuple, ids))), matcher)


def get_prompt_text(prompt: PromptLike) -> str | None:
    """Return the text of a prompt; None for token ids."""
    return prompt if isinstance(prompt, str) else prompt.get("prompt")


def expand_params(
    params: SamplingParams | Sequence[SamplingParams], count: int
) -> list[SamplingParams]:
    """Return one set of sampling parameters per prompt."""
    each = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(each) != count:
        raise ValueError(f"there are {len(each)} sampling_params for {count} prompts.")
    return each


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read the sampling parameters in `generation_config.json`; greedy if `do_sample` is false.

    Returns:
        The fields of `SamplingParams` that the file sets, as vLLM reads them.

    Raises:
        ConfigError: naming the file and the key of a value that no request may have.
    """
    path = folder / "generation_config.json"
    raw = read_object_if_present(path, ConfigError)
    fields: dict[str, Any] = {}
    for key, name in GENERATION_FIELDS.items():
        value = raw.get(key)
        if value is None:
            continue
        kind = type(getattr(SamplingParams(), name))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= 2**31 - 1 or value != kind(value):
            raise ConfigError(
                f"{path}: {key} is {quote(value)}: it must be a number"
                f"{' without a fraction' if kind is int else ''}."
            )
        try:
            fields[name] = getattr(SamplingParams(**{name: kind(value)}), name)
        except ValueError as error:
            raise ConfigError(f"{path}: {key} is not usable: {error}") from None
    for key, value in raw.items():
        is_off = value is None or value in (False, 0, 1, "", [], {})  # penalties are off at 1
        if not (is_off or key in GENERATION_FIELDS or _INERT.fullmatch(key)):
            log.warning("%s: %s is %s, which l4jax does not apply.", path, key, quote(value))
    samples = raw.get("do_sample")
    if samples not in (None, True, False) or isinstance(samples, float):
        raise ConfigError(f"{path}: do_sample is {quote(samples)}, neither true nor false.")
    return fields | {"temperature": 0.0} if samples is False else fields
