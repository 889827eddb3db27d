"""The first door: `python -m l4jax.generate --mesh 8 --prompt "..."` streams an answer."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python -m l4jax.generate --mesh 8
  python -m l4jax.generate --image sample --prompt "Which bar is the largest?"
  echo "What is 12 + 34?" | python -m l4jax.generate --temperature 0
  python -m l4jax.generate --model FOLDER --mesh 8 --image photo.png --prompt "What does it show?"
"""
SWITCH = {"on": True, "off": False, None: None}
SAMPLE = "sample"  # names the bundled chart
# Where none is given and nobody pipes one in; and where there are pictures.
PROMPT, PICTURE_PROMPT = "Why is the sky blue?", "List all values."


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, as vLLM spells it where the thing is the same."""
    parser = argparse.ArgumentParser(
        prog="l4jax.generate",
        description="Answer a prompt, with up to ten images, as a stream on standard output.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        help="folder or Hugging Face name (default: the tiny trained one that comes with l4jax)",
    )
    mesh = parser.add_mutually_exclusive_group()
    mesh.add_argument("--mesh", default="1", help="devices: 8, 2x4 or data=2,model=4 (default: 1)")
    mesh.add_argument(
        "--tensor-parallel-size", "-tp", dest="mesh", metavar="N", help="another --mesh N"
    )
    add("--prompt", help="what to ask; default: standard input, or a question of our own")
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help=f"a picture, before the prompt; up to 10; {SAMPLE}: a chart that comes with l4jax",
    )
    add("--system", help="the system message")
    add("--max-tokens", type=int, default=256, help="tokens of the answer, at most (default: 256)")
    add("--temperature", type=float, help="0 is greedy (default: the model's own)")
    add("--top-p", type=float, help="(default: the model's own)")
    add("--seed", type=int, help="the same seed gives the same answer")
    add(
        "--kernels",
        default="auto",
        choices=["portable", "hopper", "auto"],
        help="hopper: faster, on an H100 or an H200 (default: auto, hopper where it runs)",
    )
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="(default: auto)")
    add(
        "--kv-cache-dtype",
        default="auto",
        choices=["auto", "fp8"],
        help="of cached keys and values (default: that of the weights)",
    )
    add(
        "--calculate-kv-scales",
        action="store_true",
        help="calibrate an fp8 cache on 512 random tokens, where the checkpoint has no scales",
    )
    add(
        "--quantization",
        choices=["fp8", "int4"],
        help="of the weights, while they are loaded (default: as they are stored)",
    )
    add(
        "--quantize-attention",
        choices=["on", "off"],
        help="its projections, too (default: on for fp8, off for int4)",
    )
    add("--lora", metavar="FOLDER", help="an adapter as PEFT saves it, merged into the weights")
    add(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of prompt and answer (default: what fits)",
    )
    add(
        "--attn-temperature-tuning",
        choices=["on", "off"],
        help="of global layers beyond the first chunk (default: the model's own)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, call, print; 0 for an answer, 1 for a wrong question, 130 for Ctrl-C."""
    args = parse(argv)
    started = time.perf_counter()
    if args.prompt is None:
        piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
        args.prompt = piped or (PICTURE_PROMPT if args.image else PROMPT)
    try:
        return _answer(args, started)
    except (ValueError, OSError) as error:
        print(f"l4jax.generate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nl4jax.generate: interrupted", file=sys.stderr)
        return 130


def _answer(args: argparse.Namespace, started: float) -> int:
    from l4jax import LLM

    llm = LLM(
        args.model,
        mesh=args.mesh,
        dtype=args.dtype,
        kernels=args.kernels,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        calculate_kv_scales=args.calculate_kv_scales,
        quantize_attention=SWITCH[args.quantize_attention],
        lora=args.lora,
        max_model_len=args.max_model_len,
        max_num_seqs=1,
        limit_mm_per_prompt={"image": min(max(len(args.image), 1), 10)},
        attn_temperature_tuning=SWITCH[args.attn_temperature_tuning],
    )
    given = {key: getattr(args, key) for key in ("max_tokens", "temperature", "top_p", "seed")}
    params = llm.get_default_sampling_params().replace(
        **{key: value for key, value in given.items() if value is not None}
    )
    loaded, first, tokens = time.perf_counter(), 0.0, 0
    for piece in llm.stream(_make_messages(args), params):
        first = first or time.perf_counter()
        tokens += len(piece.token_ids)
        print(piece.text, end="", flush=True)
    ended = time.perf_counter()
    print(flush=True)
    rate = (tokens - 1) / (ended - first) if tokens > 1 else 0.0
    print(
        f"{tokens} tokens, {rate:.1f} tokens/s; time to first token {first - loaded:.2f} s "
        f"({first - started:.2f} s with loading and compiling)",
        file=sys.stderr,
    )
    return 0


def _make_messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    from l4jax import checkpoint

    paths = [checkpoint.SAMPLE if name == SAMPLE else Path(name) for name in args.image]
    images = [{"type": "image", "image": path} for path in paths]
    content = [*images, {"type": "text", "text": args.prompt}] if images else args.prompt
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": content}]


if __name__ == "__main__":
    sys.exit(main())
