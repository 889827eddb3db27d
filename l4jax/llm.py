"""The offline API: `LLM(model, mesh="8")`, then generate, chat or stream. Names are vLLM's."""

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from l4jax import checkpoint
from l4jax.config import Config
from l4jax.engine.capacity import Capacity
from l4jax.engine.engine import Engine, RequestUpdate
from l4jax.engine.ngram_proposer import SpeculativeConfig
from l4jax.engine.request import Constraints, SamplingParams, TokenLogprobs
from l4jax.engine.runner import Runner, keep_compilations
from l4jax.text.chat import Prompt, PromptError, encode_prompt, render_chat
from l4jax.text.detokenizer import Detokenizer
from l4jax.text.grammar import Grammar
from l4jax.text.image import ImageProcessor
from l4jax.text.tokenizer import Tokenizer

Messages: TypeAlias = Sequence[dict[str, Any]]
# Text, or {"prompt": text, "multi_modal_data": {"image": [...]}}, or {"prompt_token_ids": [...]}.
PromptLike: TypeAlias = str | Mapping[str, Any]

BUNDLED_NOTICE = (
    "No --model: the tiny Llama 4 that comes with l4jax answers, which reads charts, adds small "
    "numbers, finds a fact in a text and calls functions; for all else name Scout or Maverick."
)
DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "float": "float32"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a stream brings at a time. The last piece has a `finish_reason`.

    Attributes:
        text: new characters; never half of one.
        token_ids: the tokens that came, some of whose characters may come later.
        logprobs: of those tokens, where `SamplingParams.logprobs` asked for them.
        finish_reason: "stop" or "length" in the last piece, "error" where its step failed.
        stop_reason: the stop string or stop token id that ended it, as in vLLM.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True


class LLM:
    """A Llama 4 with its tokenizer, on a mesh of devices.

    Args:
        model: a folder with a Hugging Face checkpoint or a converted one, or a name on the Hugging
            Face hub. None is the tiny Llama 4 that comes with l4jax, trained to read charts, add
            small numbers, find a fact in a text and call functions.
        mesh: "8" is eight devices that share each layer, "2x4" two groups of four, "data=2,model=4"
            the same.
        tensor_parallel_size: another spelling of `mesh`, as in vLLM.
        dtype: "auto" (that of the checkpoint), "bfloat16" or "float32".
        quantization: "fp8" or "int4" quantizes the weights of a BF16 checkpoint while they are
            loaded; None takes them as they are stored.
        quantize_attention: whether its projections, too; None is yes for fp8, no for int4.
        lora: the folder of an adapter in PEFT's layout, merged into the weights while they are
            loaded, before they are quantized; it costs nothing afterwards, and is for all requests.
        max_model_len: tokens of prompt and answer together; None is as many as fit, up to the
            model's own.
        max_num_seqs: requests that run together.
        max_num_batched_tokens: tokens of a step.
        block_size: positions of a page of the cache.
        kv_cache_dtype: of cached keys and values, "auto" (the weights') or "fp8": half the bytes.
        calculate_kv_scales: where the checkpoint has no scales for an fp8 cache, run 512 random
            tokens once, before the first request, and give each layer one for its keys and one for
            its values: the least power of two with which twice the largest is within e4m3's 448.
            They stay. Without it the scales are 1.
        kv_cache_memory_bytes: for the page pool; None is what is free on an accelerator, and
            256 MiB on a CPU.
        gpu_memory_utilization: share of an accelerator's memory for weights and pool.
        enable_prefix_caching: whether prompts share what they begin with.
        speculative_config: `{"method": "ngram", "num_speculative_tokens": 4}` guesses tokens by
            looking up in the text itself; the answers are the same.
        limit_mm_per_prompt: `{"image": 10}` allows ten images a prompt.
        attn_temperature_tuning: True or False overrides the model's config.
        chat_template: Jinja, in place of the checkpoint's.
        seed: for requests without a seed of their own.
        load_format: "auto" reads the checkpoint's weights; "dummy" makes random ones.
        kernels: "portable" runs everywhere; "hopper" is faster, on an H100 or an H200; "auto" is
            "hopper" where it runs.
        revision: branch, tag or commit on the hub.
        quiet: no progress bars and no notices on standard error.

    Raises:
        ValueError: for a checkpoint, a mesh or a size that cannot be had; the message says what
            would do.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        mesh: str | int | None = None,
        tensor_parallel_size: int | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        quantize_attention: bool | None = None,
        lora: str | Path | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 2048,
        block_size: int | None = None,
        kv_cache_dtype: str = "auto",
        calculate_kv_scales: bool = False,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        speculative_config: Mapping[str, Any] | None = None,
        limit_mm_per_prompt: Mapping[str, int] | None = None,
        attn_temperature_tuning: bool | None = None,
        chat_template: str | None = None,
        seed: int = 0,
        load_format: str = "auto",
        kernels: str = "auto",
        revision: str | None = None,
        quiet: bool = False,
    ):
        self._is_quiet = quiet
        self._mail: dict[int, collections.deque[RequestUpdate]] = {}
        if mesh is not None and tensor_parallel_size is not None:
            raise ValueError(
                "mesh and tensor_parallel_size are two spellings of one thing: give one."
            )
        if load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format is {load_format!r}: it is 'auto' or 'dummy'.")
        if lora is not None and load_format == "dummy":
            raise ValueError("lora is for a checkpoint's weights: load_format 'dummy' has none.")
        max_images = _read_limit(limit_mm_per_prompt)
        keep_compilations(find_cache_folder() / "compiled")
        if model is None:
            folder = checkpoint.find_bundled()
            self._tell(BUNDLED_NOTICE if load_format == "auto" else None)
        else:
            folder = checkpoint.find_folder(str(model), revision=revision)
        self.folder = folder
        self.config = checkpoint.load_config(folder)
        if attn_temperature_tuning is not None:
            self.config = self.config.replace_text(has_temperature_tuning=attn_temperature_tuning)
        runner = Runner(
            self.config,
            mesh or tensor_parallel_size or 1,
            _find_dtype(dtype, folder),
            kernels=kernels,
        )
        self._tell(runner.notice)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.processor = _make_processor(self.config, folder)
        self.chat_template, self.max_images = chat_template, max_images
        self.default_params = _read_generation_config(folder)
        if load_format == "dummy":
            runner.initialize(
                seed, quantization=quantization, quantize_attention=quantize_attention
            )
        else:
            runner.load(
                folder,
                quantization=quantization,
                quantize_attention=quantize_attention,
                lora=None if lora is None else Path(lora),
                progress=not quiet,
            )
            if "nvfp4" in (checkpoint.find_quantization(folder) or ""):
                self._tell(f"The checkpoint is nvfp4; it is computed in {runner.dtype.name}.")
        capacity = Capacity(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            kv_cache_dtype=kv_cache_dtype,
            calculate_kv_scales=calculate_kv_scales,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            max_images=max_images,
            enable_prefix_caching=enable_prefix_caching,
            speculation=_read_speculation(speculative_config),
        )
        if kv_cache_dtype != "auto":
            self._tell(_explain_kv_scales(runner.kv_scales is not None, calculate_kv_scales))
        self.engine = Engine(runner, capacity, seed)

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generation_config.json` says; used where a call gives none."""
        return self.default_params

    def make_constraints(self, params: SamplingParams) -> Constraints:
        """What an answer must keep to, in token ids; for `Engine.add`. From any thread.

        Raises:
            ValueError: for a schema or a grammar that cannot be had.
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
            stop_ids = (*self.config.eos_ids, *(params.stop_token_ids or ()))
            matcher = grammar.start(self.config.text.vocab, stop_ids)
        # A word is forbidden as it stands at the beginning, and as it stands behind a space.
        spelled = (form for word in params.bad_words or () for form in (word, f" {word.lstrip()}"))
        ids = (self.tokenizer.encode(text, add_special_tokens=False) for text in spelled)
        return Constraints(tuple(dict.fromkeys(map(tuple, ids))), matcher)

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts; the answers come in the order of the prompts.

        Args:
            prompts: one or many: text, or `{"prompt": text, "multi_modal_data": {"image": [...]}}`
                with one `<|image|>` in the text for each image, or `{"prompt_token_ids": [...]}`.
            sampling_params: for all, or one for each; None is the checkpoint's default.
            use_tqdm: a progress bar on standard error.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        texts = [_find_text(prompt) for prompt in many]
        return self._run([self._read(p) for p in many], texts, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of OpenAI-style messages; or one such conversation."""
        many = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        rest = (chat_template, add_generation_prompt, tools)
        prompts = [self._render(m, *rest) for m in many]  # type: ignore[arg-type]
        return self._run(prompts, [None] * len(prompts), sampling_params, use_tqdm)

    def stream(
        self, prompt: PromptLike | Messages, sampling_params: SamplingParams | None = None
    ) -> Iterator[Piece]:
        """Answer a prompt or a conversation in pieces. Leaving the iterator cancels it."""
        is_prompt = isinstance(prompt, str | Mapping)
        read = self._read(prompt) if is_prompt else self._render(prompt, None, True, None)
        self.engine.check(read.token_ids, read.images)
        return self._stream(read, sampling_params or self.default_params)

    def _stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[Piece]:
        answer = Answer(self.tokenizer, params)
        request_id = self._add(prompt, params)
        try:
            while answer.finish_reason is None:
                yield answer.take(self._receive(request_id))
        finally:
            self._drop(request_id)

    def _add(self, prompt: Prompt, params: SamplingParams) -> int:
        request_id = self.engine.add(
            prompt.token_ids, params, prompt.images, constraints=self.make_constraints(params)
        )
        self._mail[request_id] = collections.deque()
        return request_id

    def _receive(self, request_id: int) -> RequestUpdate:
        """The next update of a request; what comes for others meanwhile waits for them."""
        while not self._mail[request_id]:
            for update in self.engine.step():
                self._mail[update.request_id].append(update)
        return self._mail[request_id].popleft()

    def _drop(self, request_id: int) -> None:
        self.engine.cancel(request_id)
        self._mail.pop(request_id, None)

    def _run(
        self,
        prompts: list[Prompt],
        texts: Sequence[str | None],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        from tqdm import tqdm

        each = _spread(params or self.default_params, len(prompts))
        # One request an answer: n of them share their prompt's pages.
        wanted = [(place, single) for place, its in enumerate(each) for single in its.split()]
        answers = [Answer(self.tokenizer, single) for _, single in wanted]
        ids: list[int] = []
        bar = tqdm(
            total=len(wanted), desc="answers", unit="req", disable=not use_tqdm or self._is_quiet
        )
        try:
            for prompt, its in zip(prompts, each, strict=True):
                self.engine.check(prompt.token_ids, prompt.images, its)
            ids = [self._add(prompts[place], single) for place, single in wanted]
            for request_id, answer in zip(ids, answers, strict=True):
                while answer.finish_reason is None:
                    answer.take(self._receive(request_id))
                bar.update()
        finally:  # a bad prompt among good ones, or Ctrl-C: nothing stays behind
            bar.close()
            for request_id in ids:
                self._drop(request_id)
        outputs: list[RequestOutput] = []
        for place, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            mine = [n for n, (owner, _) in enumerate(wanted) if owner == place]
            first = answers[mine[0]]
            outputs.append(
                RequestOutput(
                    str(ids[mine[0]]),
                    text,
                    list(prompt.token_ids),
                    [answers[n].complete(index) for index, n in enumerate(mine)],
                    first.prompt_logprobs,
                    first.cached_tokens,
                )
            )
        return outputs

    def _read(self, prompt: PromptLike) -> Prompt:
        if isinstance(prompt, str):
            return encode_prompt(self.tokenizer, self.processor, prompt)
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "multi_modal_data"}
        if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
            raise PromptError(
                f"prompt: it has the keys {sorted(prompt)}; give 'prompt' or 'prompt_token_ids', "
                "and 'multi_modal_data' beside 'prompt'."
            )
        if "prompt_token_ids" in prompt:
            if prompt.get("multi_modal_data"):
                raise PromptError("prompt: images need 'prompt' as text, not 'prompt_token_ids'.")
            return Prompt(tuple(int(token) for token in prompt["prompt_token_ids"]), ())
        images = (prompt.get("multi_modal_data") or {}).get("image", ())
        images = list(images) if isinstance(images, list | tuple) else [images]
        return encode_prompt(self.tokenizer, self.processor, prompt["prompt"], images)

    def _render(
        self,
        messages: Messages,
        chat_template: str | None,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
    ) -> Prompt:
        return render_chat(
            self.tokenizer,
            self.processor,
            messages,
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            max_images=self.max_images,
        )

    def _tell(self, line: str | None) -> None:
        if line and not self._is_quiet:
            print(line, file=sys.stderr)


class Answer:
    """An answer as it grows: tokens to characters, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._params = params
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._held = ""  # the beginning of a stop string, perhaps
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.cached_tokens = 0

    def take(self, update: RequestUpdate) -> Piece:
        """What an update adds to the text."""
        self.prompt_logprobs = self.prompt_logprobs or update.prompt_logprobs
        self.cached_tokens = update.cached_tokens
        text, count = self._held, 0
        cut = None
        for count, token in enumerate(update.token_ids, 1):  # noqa: B007
            # Token by token, so that what comes behind a stop string is not counted.
            text += self._detokenizer.push([token])
            cut = self._find_stop(text)
            if cut is not None:
                break
        tokens, logprobs = update.token_ids[:count], update.logprobs[:count]
        finish_reason = update.finish_reason
        if cut is None and finish_reason is not None:
            text += self._detokenizer.finish()
            cut = self._find_stop(text)
        if cut is not None:
            stop, at = cut
            text = text[: at + len(stop)] if self._params.include_stop_str_in_output else text[:at]
            finish_reason, self.stop_reason, self._held = "stop", stop, ""
        elif finish_reason is not None:
            self._held = ""
            if finish_reason == "stop" and tokens[-1] in (self._params.stop_token_ids or ()):
                self.stop_reason = tokens[-1]
        else:
            keep = self._count_held(text)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._text.append(text)
        self._token_ids += tokens
        self._logprobs += logprobs
        self.finish_reason = finish_reason
        return Piece(text, tokens, logprobs, finish_reason, self.stop_reason)

    def complete(self, index: int = 0) -> CompletionOutput:
        """The whole answer so far, as the answer of this number to its prompt."""
        has_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self._text),
            token_ids=self._token_ids,
            cumulative_logprob=sum(x.chosen for x in self._logprobs) if has_logprobs else None,
            logprobs=self._logprobs if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _find_stop(self, text: str) -> tuple[str, int] | None:
        found = [(text.find(stop), stop) for stop in self._params.stops if stop in text]
        return (min(found)[1], min(found)[0]) if found else None

    def _count_held(self, text: str) -> int:
        """Characters at the end that may become a stop string."""
        lengths = (
            n for stop in self._params.stops for n in range(1, len(stop)) if text.endswith(stop[:n])
        )
        return max(lengths, default=0)


def find_cache_folder() -> Path:
    """Where l4jax keeps what it can make again: `L4JAX_CACHE`, else in the user's cache."""
    if folder := os.environ.get("L4JAX_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l4jax"


def _find_dtype(dtype: str, folder: Path) -> str:
    if dtype == "auto":
        return checkpoint.find_dtype(folder)
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype is {dtype!r}: it is auto, bfloat16 or float32 "
            "(float16 cannot hold the range of Llama 4's activations)."
        )
    return DTYPES[dtype]


def _explain_kv_scales(are_stored: bool, are_calculated: bool) -> str | None:
    """Where the scales of an fp8 cache come from, if not simply from the checkpoint."""
    if are_calculated and are_stored:
        return "The checkpoint has scales for the fp8 KV cache: they are taken, none is calculated."
    if are_calculated:
        return "The scales of the fp8 KV cache are calculated from 512 random tokens, and stay."
    if are_stored:
        return None
    return (
        "The fp8 KV cache has no scales in the checkpoint and takes 1: keys and values "
        "beyond 448 are cut, small ones are coarse; --calculate-kv-scales finds better ones."
    )


def _find_text(prompt: PromptLike) -> str | None:
    return prompt if isinstance(prompt, str) else prompt.get("prompt")


def _make_processor(config: Config, folder: Path) -> ImageProcessor | None:
    if config.vision is None:
        return None
    return ImageProcessor.from_folder(
        folder, image_size=config.vision.tile, patch_size=config.vision.patch
    )


def _read_limit(limits: Mapping[str, int] | None) -> int:
    limits = dict(limits or {})
    images = limits.pop("image", 10)
    if limits or not isinstance(images, int) or images < 0:
        raise ValueError(
            'limit_mm_per_prompt is like {"image": 10}: a count of images and nothing else.'
        )
    return images


def _read_speculation(config: Mapping[str, Any] | None) -> SpeculativeConfig | None:
    if config is None:
        return None
    known = [field.name for field in dataclasses.fields(SpeculativeConfig)]
    unknown = sorted(set(config) - set(known))
    if unknown or "num_speculative_tokens" not in config:
        problem = f"has {', '.join(unknown)}" if unknown else "has no num_speculative_tokens"
        raise ValueError(f"speculative_config {problem}: it holds {', '.join(known)}.")
    return SpeculativeConfig(**config)


def _read_generation_config(folder: Path) -> SamplingParams:
    """Defaults of the checkpoint; greedy where it says not to sample."""
    path = folder / "generation_config.json"
    raw = json.loads(path.read_text()) if path.exists() else {}
    if raw.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    known = ("temperature", "top_p", "top_k", "min_p")
    return SamplingParams(**{key: raw[key] for key in known if raw.get(key) is not None})


def _spread(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    each = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(each) != count:
        raise ValueError(f"there are {len(each)} sampling_params for {count} prompts.")
    return each
