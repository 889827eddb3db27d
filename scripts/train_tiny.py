"""Trains the bundled model, in as many runs as it takes, each of so many minutes.

    python -m scripts.train_tiny --folder RUN --minutes 9 --workers 15
    python -m scripts.train_tiny --folder RUN --export l4jax/bundled

A run goes on where the last one saved, in RUN/step-N; RUN/metrics.jsonl and RUN/curves.svg say how
it goes. `--export` writes what was saved last, as Hugging Face lays it out.
"""

import argparse
import os
from pathlib import Path

from l4jax import checkpoint
from l4jax.engine.runner import keep_compilations
from l4jax.llm import find_cache_folder
from l4jax.train.bundle import export, make_plan
from l4jax.train.run import load_saved, train
from l4jax.train.vocabulary import write_vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="of the run: states, metrics, curves")
    add("--steps", type=int, default=36000, help="of the whole training (default: 36000)")
    add("--rows", type=int, default=12, help="of a batch, of 1536 tokens (default: 12)")
    add("--rate", type=float, default=8e-4, help="the largest learning rate (default: 0.0008)")
    add("--seed", type=int, default=0, help="of weights and data (default: 0)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="(default: bfloat16)")
    add("--attention", default="xla", choices=["xla", "cudnn"], help="(default: xla)")
    add("--save-every", type=int, default=1000, metavar="STEPS", help="(default: 1000)")
    add("--minutes", type=float, help="that this run may take (default: to the end)")
    add("--mesh", default="1", help="devices: 8, 2x4 or data=2,model=4 (default: 1)")
    workers = max(0, (os.cpu_count() or 1) - 1)
    add("--workers", type=int, default=workers, help="processes that draw (default: cores - 1)")
    add("--export", type=Path, metavar="FOLDER", help="write the model there, and train no more")
    add("--vocabulary", action="store_true", help="first learn and write the tokenizer anew")
    args = parser.parse_args()
    if args.vocabulary:
        write_vocabulary(checkpoint.BUNDLED)
    plan = make_plan(
        args.steps,
        rows=args.rows,
        seed=args.seed,
        save_every=args.save_every,
        rate=args.rate,
        dtype=args.dtype,
        attention=args.attention,
    )
    if args.export:
        learned = load_saved(plan, args.folder)
        config = export(args.export, plan.config, learned.params, plan.recipe.folder)
        size = (args.export / "model.safetensors").stat().st_size
        print(f"{args.export}: step {int(learned.step)}, {size / 1e6:.1f} MB, {config.text}")
        return
    keep_compilations(find_cache_folder() / "compiled")
    seconds = None if args.minutes is None else 60 * args.minutes
    train(plan, args.folder, mesh=args.mesh, workers=args.workers, seconds=seconds)


if __name__ == "__main__":
    main()
