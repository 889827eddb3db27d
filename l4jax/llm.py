"""The offline API: `LLM(model, mesh="8")`, then generate, chat or stream. Names are vLLM's."""

import collections
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from l4jax import checkpoint
from l4jax.engine.config import DTYPES, EngineConfig
from l4jax.engine.engine import Engine, RequestUpdate
from l4jax.engine.program_cache import enable_compilation_cache
from l4jax.engine.request import SamplingParams
from l4jax.engine.runner import Runner
from l4jax.inputs import InputProcessor, Messages, PromptLike, expand_params, get_prompt_text
from l4jax.outputs import CompletionBuilder, CompletionDelta, GenerationError, RequestOutput
from l4jax.text.chat import Prompt
from l4jax.text.tokenizer import Tokenizer

BUNDLED_NOTICE = (
    "No --model: the tiny Llama 4 that comes with l4jax answers, which reads charts, adds small "
    "numbers, finds a fact in a text and calls functions; for all else name Scout or Maverick."
)


class LLM:
    """A Llama 4 with its tokenizer, on a mesh of devices.

    Args:
        model: a folder with a checkpoint, or a name on the Hugging Face hub; None is the bundled
            tiny Llama 4.
        quiet: print no progress bars and no notices on standard error.
        engine_args: all other fields of `l4jax.engine.config.EngineConfig`, which documents them:
            the checkpoint (dtype, quantization, quantize_attention, lora, load_format, revision,
            chat_template, attn_temperature_tuning), the devices (mesh, tensor_parallel_size,
            data_parallel_size, decode_context_parallel_size, enable_expert_parallel, kernels,
            gpu_memory_utilization), and the engine (max_model_len, max_num_seqs,
            max_num_batched_tokens, block_size, kv_cache_dtype, calculate_kv_scales,
            kv_cache_memory_bytes, enable_prefix_caching, speculative_config, limit_mm_per_prompt,
            loop_steps, seed).

    Raises:
        TypeError: for an argument that `EngineConfig` does not have.
        ValueError: for a checkpoint, a mesh or a size that is impossible; the message says what
            is possible.
    """

    def __init__(self, model: str | Path | None = None, *, quiet: bool = False, **engine_args: Any):
        unknown = set(engine_args) - {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown:
            raise TypeError(f"LLM() got an unexpected keyword argument {min(unknown)!r}")
        engine_config = EngineConfig(model=model, **engine_args)
        self._is_quiet = quiet
        self._updates: dict[int, collections.deque[RequestUpdate]] = {}
        self._notify(enable_compilation_cache(find_cache_folder() / "compiled"))
        self.folder = self._find_folder(engine_config)
        self.config = checkpoint.load_config(self.folder)
        has_tuning = engine_config.attn_temperature_tuning
        if has_tuning is not None:
            self.config = self.config.replace_text(has_temperature_tuning=has_tuning)
        self.inputs = InputProcessor.from_folder(self.folder, self.config, engine_config)
        self.config = dataclasses.replace(self.config, eos_ids=self.inputs.eos_ids)
        runner = Runner(
            self.config,
            engine_config.mesh_shape,
            _choose_dtype(engine_config.dtype, self.folder),
            kernels=engine_config.kernels,
            enable_expert_parallel=engine_config.enable_expert_parallel,
        )
        self._notify(runner.notice)
        self._load_weights(runner, engine_config)
        if engine_config.kv_cache_dtype != "auto":
            self._notify(
                _explain_kv_scales(
                    has_stored=runner.kv_scales is not None,
                    calculates=engine_config.calculate_kv_scales,
                )
            )
        self.engine = Engine(runner, engine_config)

    def _find_folder(self, engine_config: EngineConfig) -> Path:
        if engine_config.model is not None:
            return checkpoint.find_folder(str(engine_config.model), revision=engine_config.revision)
        self._notify(BUNDLED_NOTICE if engine_config.load_format == "auto" else None)
        return checkpoint.find_bundled()

    def _load_weights(self, runner: Runner, engine_config: EngineConfig) -> None:
        formats = {
            "quantization": engine_config.quantization,
            "quantize_attention": engine_config.quantize_attention,
        }
        if engine_config.load_format == "dummy":
            runner.initialize(engine_config.seed, **formats)
            return
        lora = engine_config.lora
        runner.load(
            self.folder,
            **formats,
            lora=None if lora is None else Path(lora),
            progress=not self._is_quiet,
        )
        if "nvfp4" in (checkpoint.detect_quantization(self.folder) or ""):
            self._notify(f"The checkpoint is nvfp4; it is computed in {runner.dtype.name}.")

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.inputs.tokenizer

    def get_default_sampling_params(self, **fallbacks: Any) -> SamplingParams:
        """Return the defaults of `generation_config.json`, for calls without parameters.

        Args:
            **fallbacks: fields of `SamplingParams` for keys that the file lacks.
        """
        return SamplingParams(**(fallbacks | dict(self.inputs.generation_fields)))

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; the outputs are in the order of the prompts.

        Args:
            prompts: one or many: text, or `{"prompt": text, "multi_modal_data": {"image": [...]}}`
                with one `<|image|>` in the text for each image, or `{"prompt_token_ids": [...]}`.
            sampling_params: for all prompts, or one for each; None is the checkpoint's default.
            use_tqdm: show a progress bar on standard error.

        Raises:
            GenerationError: a step failed; the outputs of all requests are in it.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        texts = [get_prompt_text(prompt) for prompt in many]
        encoded = [self.inputs.encode_prompt(prompt) for prompt in many]
        return self._complete(encoded, texts, sampling_params, use_tqdm)

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
        """Answer one conversation or several, each a list of OpenAI-style messages.

        Raises:
            GenerationError: as for `generate`.
        """
        many = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        rendered = [
            self.inputs.render_messages(
                conversation,  # type: ignore[arg-type]
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
            )
            for conversation in many
        ]
        return self._complete(rendered, [None] * len(rendered), sampling_params, use_tqdm)

    def stream(
        self, prompt: PromptLike | Messages, sampling_params: SamplingParams | None = None
    ) -> Iterator[CompletionDelta]:
        """Complete a prompt or a conversation piece by piece. Closing the iterator aborts it.

        Raises:
            GenerationError: a step failed, after the pieces before it.
        """
        if isinstance(prompt, str | Mapping):
            encoded = self.inputs.encode_prompt(prompt)
        else:
            encoded = self.inputs.render_messages(prompt)
        self.engine.check(encoded.token_ids, encoded.images)
        params = sampling_params or self.inputs.default_params
        return self._stream(encoded, CompletionBuilder(self.tokenizer, params))

    def _stream(self, prompt: Prompt, builder: CompletionBuilder) -> Iterator[CompletionDelta]:
        yield from self._run([(prompt, builder)])
        if builder.error is not None:
            raise GenerationError(f"a step failed: {builder.error}")

    def _complete(
        self,
        prompts: list[Prompt],
        texts: Sequence[str | None],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Complete encoded prompts: n requests each, which share the pages of their prompt."""
        from tqdm import tqdm

        each = expand_params(params or self.inputs.default_params, len(prompts))
        for prompt, its in zip(prompts, each, strict=True):
            self.engine.check(prompt.token_ids, prompt.images, its)
        builders = [
            [CompletionBuilder(self.tokenizer, single) for single in its.split()] for its in each
        ]
        requests = [
            (prompt, builder)
            for prompt, its in zip(prompts, builders, strict=True)
            for builder in its
        ]
        hides_bar = not use_tqdm or self._is_quiet
        with tqdm(total=len(requests), desc="completions", unit="req", disable=hides_bar) as bar:
            for delta in self._run(requests):
                bar.update(delta.finish_reason is not None)
        outputs = [
            RequestOutput(
                str(its[0].request_id),
                text,
                list(prompt.token_ids),
                [builder.build(index) for index, builder in enumerate(its)],
                its[0].prompt_logprobs,
                its[0].cached_tokens,
            )
            for text, prompt, its in zip(texts, prompts, builders, strict=True)
        ]
        errors = [builder.error for _, builder in requests if builder.error is not None]
        if errors:
            raise GenerationError(
                f"{len(errors)} of {len(requests)} requests failed: {errors[0]}", outputs
            )
        return outputs

    def _run(
        self, requests: Sequence[tuple[Prompt, CompletionBuilder]]
    ) -> Iterator[CompletionDelta]:
        """Run requests until all have ended; abort them if the iterator is closed before."""
        running: dict[int, CompletionBuilder] = {}
        try:
            for prompt, builder in requests:
                running[self._submit(prompt, builder.params)] = builder
            while running:
                if not any(self._updates[request_id] for request_id in running):
                    # Updates of other iterators' requests wait for them.
                    for update in self.engine.step():
                        self._updates[update.request_id].append(update)
                for request_id, builder in list(running.items()):
                    while self._updates[request_id] and builder.finish_reason is None:
                        yield builder.add(self._updates[request_id].popleft())
                    if builder.finish_reason is not None:
                        self._abort(request_id)
                        del running[request_id]
        finally:  # Ctrl-C, a closed iterator, or a failure
            for request_id in running:
                self._abort(request_id)

    def _submit(self, prompt: Prompt, params: SamplingParams) -> int:
        request_id = self.engine.add(
            prompt.token_ids,
            params,
            prompt.images,
            constraints=self.inputs.make_constraints(params),
        )
        self._updates[request_id] = collections.deque()
        return request_id

    def _abort(self, request_id: int) -> None:
        self.engine.cancel(request_id)
        self._updates.pop(request_id, None)

    def _notify(self, line: str | None) -> None:
        if line and not self._is_quiet:
            print(line, file=sys.stderr)


def find_cache_folder() -> Path:
    """Return the folder of compiled programs: `L4JAX_CACHE`, or one in the user's cache."""
    if folder := os.environ.get("L4JAX_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "l4jax"
    try:
        return Path.home() / ".cache" / "l4jax"
    except RuntimeError:  # a container's user without a home
        return Path(os.devnull) / "l4jax"


def _choose_dtype(dtype: str, folder: Path) -> str:
    return checkpoint.choose_dtype(folder) if dtype == "auto" else DTYPES[dtype]


def _explain_kv_scales(*, has_stored: bool, calculates: bool) -> str | None:
    """Say where the scales of an fp8 cache come from, unless it is simply the checkpoint."""
    if calculates and has_stored:
        return "The checkpoint has scales for the fp8 KV cache: they are taken, none is calculated."
    if calculates:
        return "The scales of the fp8 KV cache are calculated from 512 random tokens, and stay."
    if has_stored:
        return None
    return (
        "The checkpoint has no scales for the fp8 KV cache, which uses 1: keys and values beyond "
        "448 are clipped, small ones are coarse; --calculate-kv-scales calibrates better ones."
    )
