"""How fast: `python -m l4jax.bench --config scout --quantization fp8`, with random weights."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python -m l4jax.bench
  python -m l4jax.bench --config scout --quantization fp8 --plot decode.png
  python -m l4jax.bench --config scout --layers 24 --decode 1x256 1x32768 1xmax --prefill
  python -m l4jax.bench --config scout --quantization int4 --requests 512 --decode --prefill
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="l4jax.bench",
        description="Measure a model of random weights against what its device could do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="tiny", choices=["tiny", "scout", "maverick"], help="(default: tiny)")
    add("--layers", type=int, metavar="N", help="fewer than the model has (default: all)")
    add("--mesh", default="1", help="devices: 8, 2x4 or data=2,model=4 (default: 1)")
    kernels = ["portable", "hopper", "auto"]
    add("--kernels", default="auto", choices=kernels, help="(default: the faster that runs)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="(default: bfloat16)")
    add("--quantization", choices=["fp8", "int4"], help="of the weights (default: none)")
    add("--kv-cache-dtype", default="auto", choices=["auto", "fp8"], help="(default: auto)")
    numbers: Any = {"type": int, "nargs": "*", "metavar": "N"}
    add(
        "--decode",
        nargs="*",
        type=_read_pair,
        metavar="ROWSxTOKENS",
        default=[(rows, 256) for rows in (1, 8, 32, 128)],
        help="rows, and tokens before each, or max: as many as fit (default: 1x256 8x256 32x256 "
        "128x256); none: no decode",
    )
    add("--steps", type=int, default=64, metavar="N", help="of decode (default: 64)")
    add("--prefill", default=[2048, 8192], help="lengths of prompts; none: no prefill", **numbers)
    add("--requests", type=int, default=0, metavar="N", help="through the engine (default: none)")
    span: Any = {"type": int, "nargs": 2, "metavar": ("LEAST", "MOST")}
    add("--input-len", default=[256, 768], help="tokens of their prompts", **span)
    add("--output-len", default=[128, 384], help="tokens of their answers", **span)
    add("--max-num-seqs", type=int, default=256, metavar="N", help="that run together")
    add("--max-num-batched-tokens", type=int, default=2048, metavar="N", help="of an engine's step")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="of the engine")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the figures")
    add("--plot", type=Path, metavar="FILE", help="draw decode against batch; needs l4jax[bench]")
    add("--profile", type=Path, metavar="FOLDER", help="write a trace for XProf or Perfetto")
    return parser.parse_args(argv)


def _read_pair(text: str) -> tuple[int, int | None]:
    rows, _, tokens = text.partition("x")
    if not (rows.isdigit() and (tokens.isdigit() or tokens == "max") and int(rows)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not like 8x256 or 8xmax, rows x tokens before each"
        )
    return int(rows), None if tokens == "max" else int(tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, measure, print; 0 for figures, 1 for a wrong question."""
    args = parse(argv)
    try:
        return _measure(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"l4jax.bench: {error}", file=sys.stderr)
        return 1


def _measure(args: argparse.Namespace) -> int:
    import jax

    from l4jax import config
    from l4jax.benchmark.measure import Bench
    from l4jax.benchmark.report import (
        draw_plot,
        format_head,
        format_line,
        format_start,
        write_json,
    )

    model = getattr(config, args.config.upper())
    if args.layers is not None:
        model = model.replace_text(layers=args.layers)
    bench = Bench(
        model,
        mesh=args.mesh,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        kernels=args.kernels,
        seed=args.seed,
    )
    about = {
        "config": args.config,
        "layers": model.text.layers,
        "quantization": args.quantization,
        "format": args.quantization or args.dtype,
        "kernels": bench.runner.kernels,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "quantization"))
    print(format_head(), flush=True)
    figures = []
    trace = jax.profiler.trace(args.profile) if args.profile else contextlib.nullcontext()
    with trace:
        for figure in _run(bench, args):
            figures.append(figure)
            print(format_line(figure), flush=True)
    print(format_start(bench.phases))
    if args.json:
        write_json(args.json, about, figures, bench.phases)
    if args.plot:
        draw_plot(args.plot, about, figures)
    return 0


def _run(bench: Any, args: argparse.Namespace) -> Iterator[Any]:
    for batch, context in args.decode:
        yield bench.measure_decode(batch, context, args.steps)
    for length in args.prefill:
        yield bench.measure_prefill(length)
    if args.requests:
        inputs, outputs = (
            range(least, most + 1) for least, most in (args.input_len, args.output_len)
        )
        yield bench.measure_throughput(
            args.requests,
            inputs,
            outputs,
            seqs=args.max_num_seqs,
            tokens=args.max_num_batched_tokens,
            utilization=args.gpu_memory_utilization,
        )


if __name__ == "__main__":
    sys.exit(main())
