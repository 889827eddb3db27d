"""Prints what one step communicates on a mesh, read off the compiled program.

    python -m scripts.collectives --config scout --mesh 2x4 --enable-expert-parallel

Kind, count and bytes of the collectives of a decode step and of a prefill step, at the model's real
shapes. CPU devices compile the programs; no weight is allocated.
"""

import argparse
import collections

from l4jax.benchmark.collectives import compile_step, find_collectives
from l4jax.config import MAVERICK, SCOUT, TINY
from l4jax.strategies import check_mesh, choose_strategy
from sharding import Layout, make_mesh, prepare_devices

CONFIGS = {"tiny": TINY, "scout": SCOUT, "maverick": MAVERICK}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what one step communicates on a mesh.")
    parser.add_argument("--config", choices=CONFIGS, default="scout")
    parser.add_argument("--layers", type=int, default=4, help="(default: 4)")
    parser.add_argument("--mesh", default="8", help="8, 2x4 or data=2,seq=2,model=2 (default: 8)")
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--batch", type=int, default=1, help="rows of a data shard (default: 1)")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of a prefill step")
    args = parser.parse_args()
    prepare_devices(args.mesh)
    rules = choose_strategy(args.mesh, enable_expert_parallel=args.enable_expert_parallel)
    layout = Layout(make_mesh(args.mesh), rules)
    config = CONFIGS[args.config].replace_text(layers=args.layers)
    check_mesh(config, layout)
    print(f"{args.config}, {args.layers} layers, --mesh {args.mesh}, strategy {rules.name}")
    print(f"{'step':<22}{'part':<11}{'kind':<20}{'count':>6}{'bytes':>14}")
    steps = (("decode", args.batch, args.batch), ("prefill", 1, args.prefill))
    for name, rows, tokens in steps:
        totals: collections.Counter[tuple[str, str]] = collections.Counter()
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for found in find_collectives(compile_step(config, layout, rows, tokens)):
            counts[found.part, found.kind] += 1
            totals[found.part, found.kind] += found.bytes
        for (part, kind), count in sorted(counts.items()):
            step = f"{name}, {tokens} tokens"
            print(f"{step:<22}{part:<11}{kind:<20}{count:>6}{totals[part, kind]:>14,}")


if __name__ == "__main__":
    main()
