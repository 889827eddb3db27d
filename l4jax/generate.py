"""The command `python -m l4jax.generate --mesh 8 --prompt "..."`: stream one completion."""

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from l4jax.engine.arguments import add_engine_arguments, make_engine_config, parse_arguments

EXAMPLES = """examples:
  python -m l4jax.generate --mesh 8
  python -m l4jax.generate --image sample --prompt "Which bar is the largest?"
  echo "What is 12 + 34?" | python -m l4jax.generate --temperature 0
  python -m l4jax.generate --model FOLDER --mesh 8 --image photo.png --prompt "What does it show?"

environment:
  L4JAX_CACHE      folder of compiled programs (default: ~/.cache/l4jax)
  L4JAX_TRACEBACK  1: raise errors with their traceback
"""
# Fields of `EngineConfig` that are flags here; --seed is the sampling seed.
ENGINE_FIELDS = (
    "model",
    "dtype",
    "quantization",
    "quantize_attention",
    "lora",
    "attn_temperature_tuning",
    "mesh",
    "tensor_parallel_size",
    "decode_context_parallel_size",
    "enable_expert_parallel",
    "kernels",
    "kv_cache_dtype",
    "calculate_kv_scales",
    "max_model_len",
)
SAMPLING = ("max_tokens", "temperature", "top_p", "seed")
MAX_TOKENS = 256  # of a checkpoint that names no max_new_tokens
TRACEBACK = "L4JAX_TRACEBACK"  # environment variable: raise instead of a sentence
SAMPLE = "sample"  # name of the bundled chart
# Defaults on a terminal: of a prompt, and of one with images.
PROMPT, IMAGE_PROMPT = "Why is the sky blue?", "List all values."


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; spellings are vLLM's."""
    parser = argparse.ArgumentParser(
        prog="l4jax.generate",
        description="Complete a prompt, with up to ten images, as a stream on standard output.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt", help="(default: standard input, or a question of our own)")
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help=f"an image before the prompt; up to 10; {SAMPLE}: the bundled chart",
    )
    add("--system", help="the system message")
    add("--max-tokens", type=int, help="tokens of the completion (default: the model's, or 256)")
    add("--temperature", type=float, help="0 is greedy (default: the model's)")
    add("--top-p", type=float, help="(default: the model's)")
    add("--seed", type=int, help="the same seed gives the same completion")
    add_engine_arguments(parser, ENGINE_FIELDS)
    return parse_arguments(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, stream, print; return 0, 1 for any failure, 130 for Ctrl-C."""
    args = parse(argv)
    started, tokens = time.perf_counter(), 0
    if args.prompt is None:
        piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
        args.prompt = piped or (IMAGE_PROMPT if args.image else PROMPT)
    try:
        from l4jax.llm import LLM

        limit = {"image": min(max(len(args.image), 1), 10)}
        config = make_engine_config(args, ENGINE_FIELDS, max_num_seqs=1, limit_mm_per_prompt=limit)
        llm = LLM(**vars(config))
        given = {key: getattr(args, key) for key in SAMPLING if getattr(args, key) is not None}
        params = llm.get_default_sampling_params(max_tokens=MAX_TOKENS).replace(**given)
        loaded, first = time.perf_counter(), 0.0
        with _hide_log():
            for delta in llm.stream(_make_messages(args), params):
                first = first or time.perf_counter()
                tokens += len(delta.token_ids)
                print(delta.text, end="", flush=True)
    except Exception as error:  # of any kind: a sentence, and never half an answer with status 0
        if os.environ.get(TRACEBACK):
            raise
        print("\n" if tokens else "", end="", flush=True)
        print(f"l4jax.generate: {_describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nl4jax.generate: interrupted", file=sys.stderr)
        return 130
    ended = time.perf_counter()
    print(flush=True)
    rate = (tokens - 1) / (ended - first) if tokens > 1 else 0.0
    print(
        f"{tokens} tokens, {rate:.1f} tokens/s; time to first token {first - loaded:.2f} s "
        f"({first - started:.2f} s with loading and compiling)",
        file=sys.stderr,
    )
    return 0


def _describe(error: Exception) -> str:
    """Describe an error in a sentence; unexpected ones with their kind and the way to a traceback.

    Errors for users are ValueError, OSError and GenerationError.
    """
    from l4jax.outputs import GenerationError

    if isinstance(error, ValueError | OSError | GenerationError):
        return str(error)
    from l4jax.engine.engine import describe_error

    return f"{describe_error(error)} ({TRACEBACK}=1 prints a traceback)"


@contextlib.contextmanager
def _hide_log() -> Iterator[None]:
    """Hide the engine's log of a failed step: the command prints its cause."""
    engine = logging.getLogger("l4jax.engine.engine")

    def is_shown(_: logging.LogRecord) -> bool:
        return bool(os.environ.get(TRACEBACK))

    engine.addFilter(is_shown)
    try:
        yield
    finally:
        engine.removeFilter(is_shown)


def _make_messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    from l4jax import checkpoint

    paths = [checkpoint.SAMPLE if name == SAMPLE else Path(name) for name in args.image]
    images = [{"type": "image", "image": path} for path in paths]
    content = [*images, {"type": "text", "text": args.prompt}] if images else args.prompt
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": content}]


if __name__ == "__main__":
    sys.exit(main())
