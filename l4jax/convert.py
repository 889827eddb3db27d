"""The command `python -m l4jax.convert SRC DST`: write a checkpoint in another format.

Orbax loads faster, on any mesh. With `--quantization` it writes compressed-tensors of half (fp8) or
a third (int4) of the size, which other servers read, too.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

EXAMPLES = """examples:
  python -m l4jax.convert meta-llama/Llama-4-Scout-17B-16E-Instruct scout
  python -m l4jax.generate --model scout --mesh 8
  python -m l4jax.convert --quantization fp8 FOLDER scout-fp8
  python -m l4jax.convert --quantization int4 FOLDER scout-w4a16
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="l4jax.convert",
        description="Write a published Llama 4 checkpoint as Orbax, or quantized "
        "as compressed-tensors, with config and tokenizer. "
        "DST appears only after everything is written.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="folder or Hugging Face name of a checkpoint in safetensors")
    add("folder", metavar="DST", help="folder to create; a --model for the other commands")
    add("--revision", help="branch, tag or commit of SRC on the hub")
    add("--dtype", choices=["bfloat16", "float32"], help="(default: that of the checkpoint)")
    add(
        "--quantization",
        choices=["fp8", "int4"],
        help="write safetensors instead, with feed-forward weights in this format",
    )
    add("--overwrite", action="store_true", help="replace DST after everything is written")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, print; return 0, 1 for an invalid argument, 130 for Ctrl-C."""
    args = parse(argv)
    started = time.perf_counter()
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # leaves accelerators to other processes
    from l4jax.checkpoint import compressed_tensors_writer, find_folder, orbax_writer

    try:
        if args.quantization and args.dtype:
            raise ValueError(
                f"--dtype {args.dtype} is for Orbax: with --quantization, unquantized weights "
                "keep their dtype; leave one of the two out."
            )
        source = find_folder(args.source, revision=args.revision)
        how = {"overwrite": args.overwrite, "progress": not args.quiet}
        if args.quantization:
            nbytes = compressed_tensors_writer.quantize_folder(
                source, args.folder, args.quantization, **how
            )
        else:
            nbytes = orbax_writer.convert_folder(source, args.folder, dtype=args.dtype, **how)
    except (ValueError, OSError) as error:
        print(f"l4jax.convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nl4jax.convert: interrupted; DST is unchanged", file=sys.stderr)
        return 130
    print(f"{args.folder}: {nbytes} bytes of parameters in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
