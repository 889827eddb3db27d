"""Train the bundled model, in any number of runs of a few minutes each.

    python -m scripts.train_tiny --folder RUN --minutes 9 --workers 15
    python -m scripts.train_tiny --folder RUN --export l4jax/bundled

A run resumes from the newest saved state, RUN/step-N. Metrics are in RUN/metrics.jsonl and
RUN/curves.svg. `--export` writes the newest saved state in Hugging Face's layout.
"""

import argparse
import os
import sys
from pathlib import Path

from l4jax import checkpoint
from l4jax.engine.program_cache import enable_compilation_cache
from l4jax.llm import find_cache_folder
from l4jax.train.bundle import export, make_training_config
from l4jax.train.tokenizer import train_tokenizer
from l4jax.train.trainer import load_saved, train


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="folder of the run: states, metrics, curves")
    add("--steps", type=int, default=36000, help="training steps in all (default: 36000)")
    add("--rows", type=int, default=12, help="rows of a batch, 1536 tokens each (default: 12)")
    add("--rate", type=float, default=8e-4, help="peak learning rate (default: 0.0008)")
    add("--seed", type=int, default=0, help="seed of weights and data (default: 0)")
    add(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="of the computation (default: bfloat16)",
    )
    add("--attention", default="xla", choices=["xla", "cudnn"], help="kernel (default: xla)")
    add(
        "--save-every",
        type=int,
        default=1000,
        metavar="STEPS",
        help="between saves (default: 1000)",
    )
    add("--minutes", type=float, help="time limit of this run (default: none)")
    add("--mesh", default="1", help="devices: 8, 2x4 or data=2,model=4 (default: 1)")
    workers = max(0, (os.cpu_count() or 1) - 1)
    add("--workers", type=int, default=workers, help="data loader processes (default: cores - 1)")
    add("--export", type=Path, metavar="FOLDER", help="write the model there instead of training")
    add("--vocabulary", action="store_true", help="first train and write the tokenizer")
    args = parser.parse_args()
    if args.vocabulary:
        train_tokenizer(checkpoint.BUNDLED)
    training = make_training_config(
        args.steps,
        rows=args.rows,
        seed=args.seed,
        save_every=args.save_every,
        rate=args.rate,
        dtype=args.dtype,
        attention=args.attention,
    )
    if args.export:
        state = load_saved(training, args.folder)
        config = export(args.export, training.model, state.params, training.data.folder)
        size = (args.export / "model.safetensors").stat().st_size
        print(f"{args.export}: step {int(state.step)}, {size / 1e6:.1f} MB, {config.text}")
        return
    if notice := enable_compilation_cache(find_cache_folder() / "compiled"):
        print(notice, file=sys.stderr)
    seconds = None if args.minutes is None else 60 * args.minutes
    train(training, args.folder, mesh=args.mesh, workers=args.workers, seconds=seconds)


if __name__ == "__main__":
    main()
