"""Train a LoRA adapter of a checkpoint on conversations, and save it in PEFT's layout.

    python -m scripts.finetune --model FOLDER --data chats.jsonl --out ADAPTER
    python -m l4jax.generate --model FOLDER --lora ADAPTER

A line of the data is {"messages": [...]}, in OpenAI's chat format; the loss covers the
assistant's messages. To resume an interrupted run, repeat the command with the same data.
"""

import argparse
import hashlib
import math
import sys
from pathlib import Path

from l4jax import checkpoint
from l4jax.engine.program_cache import enable_compilation_cache
from l4jax.llm import find_cache_folder
from l4jax.text.tokenizer import Tokenizer
from l4jax.text.tokenizer_check import check_tokenizer
from l4jax.train.batches import DataConfig
from l4jax.train.conversations import count_tiles, read_documents
from l4jax.train.lora import TARGETS, LoraConfig, make_processor, train_adapter
from l4jax.train.train_step import Hyperparameters
from l4jax.train.trainer import TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA adapter on conversations.")
    add = parser.add_argument
    add("--model", required=True, help="folder or Hugging Face name, in BF16 or F32")
    add("--data", type=Path, required=True, metavar="FILE", help="a conversation per line, as JSON")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of adapter and states")
    add("--rank", type=int, default=16, help="rank of the factors (default: 16)")
    add("--alpha", type=float, default=32.0, help="alpha / rank scales the product (default: 32)")
    add(
        "--targets",
        nargs="+",
        default=["attention", "shared_expert", "dense"],
        choices=list(TARGETS),
        help="adapted matrices (default: attention shared_expert dense)",
    )
    add("--rate", type=float, default=2e-4, help="peak learning rate (default: 0.0002)")
    add("--steps", type=int, default=500, help="training steps in all (default: 500)")
    add("--rows", type=int, default=4, help="per batch, a multiple of the data axis (default: 4)")
    add("--length", type=int, default=2048, help="tokens per row (default: 2048)")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="(default: auto)")
    add("--mesh", default="1", help="devices: 8, 2x4 or data=2,model=4 (default: 1)")
    add("--seed", type=int, default=0, help="seed of factors and data order (default: 0)")
    add("--save-every", type=int, default=100, metavar="STEPS", help="(default: 100)")
    add(
        "--note-every", type=int, metavar="STEPS", help="metrics (default: gcd of 10 and the above)"
    )
    args = parser.parse_args()
    try:
        _run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"finetune: {error}")


def _run(args: argparse.Namespace) -> None:
    if notice := enable_compilation_cache(find_cache_folder() / "compiled"):
        print(notice, file=sys.stderr)
    folder = checkpoint.find_folder(args.model)
    config = checkpoint.load_config(folder)
    processor = make_processor(config, folder)
    tokenizer = Tokenizer.from_folder(folder)
    check_tokenizer(tokenizer, config, folder)
    documents = read_documents(args.data, tokenizer, processor, args.length)
    data = DataConfig(
        folder=folder,
        seed=args.seed,
        steps=args.steps,
        rows=args.rows,
        length=args.length,
        chunk=min(args.length, config.text.chunk),
        tiles=count_tiles(documents, args.rows),
        features=config.vision.features if config.vision else 0,
    )
    hparams = Hyperparameters(
        steps=args.steps,
        rate=args.rate,
        warmup=max(1, args.steps // 20),
        decay=0.0,
        balance=0.0,  # routers are frozen
        dtype=checkpoint.choose_dtype(folder) if args.dtype == "auto" else args.dtype,
    )
    note_every = args.note_every or math.gcd(10, args.save_every)
    training = TrainingConfig(config, data, hparams, args.save_every, note_every)
    digest = hashlib.sha256(args.data.read_bytes()).hexdigest()
    lora_config = LoraConfig(training, digest, args.rank, args.alpha, tuple(args.targets))
    print(f"{len(documents)} conversations, {sum(len(d.token_T) for d in documents)} tokens")
    train_adapter(lora_config, documents, args.out, model=args.model, mesh=args.mesh)
    print(f"{args.out}: load it with --lora {args.out}")


if __name__ == "__main__":
    main()
