"""The command `python -m l4jax.bench --config scout --quantization fp8`: measure random weights."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from l4jax.benchmark import report
from l4jax.engine.arguments import add_engine_arguments, make_engine_config, parse_arguments

EXAMPLES = """examples:
  python -m l4jax.bench
  python -m l4jax.bench --config scout --quantization fp8 --json fp8.json --plot decode.svg
  python -m l4jax.bench --from-json fp8.json --plot decode.svg
  python -m l4jax.bench --config scout --layers 24 --decode 1x256 1x32768 1xmax --prefill
  python -m l4jax.bench --config scout --quantization int4 --requests 512 --decode --prefill
"""
# Fields of `EngineConfig` that are flags here.
ENGINE_FIELDS = (
    "mesh",
    "tensor_parallel_size",
    "decode_context_parallel_size",
    "enable_expert_parallel",
    "kernels",
    "dtype",
    "quantization",
    "quantize_attention",
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "seed",
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="l4jax.bench",
        description="Measure a model of random weights, and compare with the device's limits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("workload").add_argument
    add("--config", default="tiny", choices=["tiny", "scout", "maverick"], help="(default: tiny)")
    add("--layers", type=int, metavar="N", help="fewer layers than the model's (default: all)")
    numbers: Any = {"type": int, "nargs": "*", "metavar": "N"}
    add(
        "--decode",
        nargs="*",
        type=_parse_decode,
        metavar="ROWSxTOKENS",
        default=[(rows, 256) for rows in (1, 8, 32, 128)],
        help="rows, and tokens of context of each, or max: as many as fit (default: 1x256 8x256 "
        "32x256 128x256); none: no decode",
    )
    add("--steps", type=int, default=64, metavar="N", help="decode steps (default: 64)")
    add("--prefill", default=[2048, 8192], help="lengths of prompts; none: no prefill", **numbers)
    add(
        "--requests",
        type=int,
        default=0,
        metavar="N",
        help="requests through the engine (default: 0)",
    )
    span: Any = {"type": int, "nargs": 2, "metavar": ("LEAST", "MOST")}
    add("--input-len", default=[256, 768], help="tokens of their prompts", **span)
    add("--output-len", default=[128, 384], help="tokens of their outputs", **span)
    add_engine_arguments(parser, ENGINE_FIELDS, dtype="bfloat16", max_num_seqs=256)
    add = parser.add_argument_group("results").add_argument
    add("--json", type=Path, metavar="FILE", help="write the figures")
    add(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="read the figures from a file of --json, and measure nothing",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot decode steps against batch, as .svg, .png or .pdf; needs l4jax[bench]",
    )
    add("--profile", type=Path, metavar="FOLDER", help="write a trace for XProf or Perfetto")
    return parse_arguments(parser, argv)


def _parse_decode(text: str) -> tuple[int, int | None]:
    rows, _, tokens = text.partition("x")
    if not (rows.isdigit() and (tokens.isdigit() or tokens == "max") and int(rows)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not like 8x256 or 8xmax, rows x tokens of context"
        )
    return int(rows), None if tokens == "max" else int(tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure or read, print; return 0, or 1 for an invalid argument."""
    args = parse(argv)
    try:
        results = report.read_json(args.from_json) if args.from_json else _measure(args)
        if args.from_json:
            print(report.format_results(results))
        if args.json:
            report.write_json(args.json, results)
        if args.plot:
            report.draw_plot(args.plot, results)
    except (ValueError, OSError, ImportError) as error:
        print(f"l4jax.bench: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(args: argparse.Namespace) -> report.Results:
    import jax

    from l4jax import config
    from l4jax.benchmark.measure import Bench

    model = getattr(config, args.config.upper())
    if args.layers is not None:
        model = model.replace_text(layers=args.layers)
    engine_config = make_engine_config(args, ENGINE_FIELDS)
    bench = Bench(model, engine_config)
    about = {
        "config": args.config,
        "layers": model.text.layers,
        "quantization": args.quantization,
        "format": args.quantization or bench.runner.dtype.name,
        "kernels": bench.runner.kernels,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    results = report.Results(about, [], bench.phases)
    print(report.format_header(results), flush=True)
    trace = jax.profiler.trace(args.profile) if args.profile else contextlib.nullcontext()
    with trace:
        for figure in _iterate_figures(bench, args):
            results.figures.append(figure)
            print(report.format_figure(figure), flush=True)
    print(report.format_start(results))
    return results


def _iterate_figures(bench: Any, args: argparse.Namespace) -> Iterator[report.Figure]:
    for batch, context in args.decode:
        yield bench.measure_decode(batch, context, args.steps)
    for length in args.prefill:
        yield bench.measure_prefill(length)
    if args.requests:
        inputs, outputs = (
            range(least, most + 1) for least, most in (args.input_len, args.output_len)
        )
        yield bench.measure_throughput(args.requests, inputs, outputs)


if __name__ == "__main__":
    sys.exit(main())
