"""Compares quantized formats with BF16 by their next-token distributions.

    python -m scripts.compare_formats [--model FOLDER] [--tokens 256]

Prints the KL divergence in nats and the top-1 agreement per format, over random prompts. Random
weights are the worst case: their distributions are flat, and their routers' scores are close.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import cache, checkpoint, decode
from l4jax.engine.config import EngineConfig
from l4jax.engine.runner import Runner
from l4jax.kernels.formats import FP8
from l4jax.strategies import activate
from l4jax.testing import write_model

# Name -> (online quantization, dtype of keys and values, whether their scales are calculated;
# scales are 1 otherwise, if the checkpoint has none).
FORMATS = {
    "bf16": (None, jnp.bfloat16, False),
    "fp8": ("fp8", jnp.bfloat16, False),
    "int4": ("int4", jnp.bfloat16, False),
    "fp8 KV": (None, FP8, False),
    "fp8 KV, calculated": (None, FP8, True),
    "fp8, fp8 KV": ("fp8", FP8, False),
}
PAGE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quantized formats with BF16, in a table.")
    parser.add_argument("--model", type=Path, help="default: a tiny model with random weights")
    parser.add_argument("--tokens", type=int, default=256, help="per prompt (default: 256)")
    parser.add_argument("--prompts", type=int, default=4, help="(default: 4)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch) / "tiny"
        if args.model is None:
            write_model(folder)
        rows = {name: score(folder, args, *settings) for name, settings in FORMATS.items()}
    wanted = rows["bf16"]
    print(f"{'':20}{'KL, nats':>10}{'top 1':>8}")
    for name, found in rows.items():
        kl = float((np.exp(wanted) * (wanted - found)).sum(-1).mean())
        same = float((wanted.argmax(-1) == found.argmax(-1)).mean())
        print(f"{name:20}{kl:10.5f}{same:8.1%}")


def score(
    folder: Path,
    args: argparse.Namespace,
    quantization: str | None,
    kv_dtype: Any,
    calculates_kv_scales: bool,
) -> np.ndarray:
    """Compute log-probabilities of random prompts, the same for each format.

    Returns:
        float32 [prompts * tokens, V].
    """
    config = checkpoint.load_config(folder)
    runner = Runner(config, 1, "bfloat16")
    runner.load(folder, quantization=quantization, progress=False)
    engine_config = EngineConfig(
        max_model_len=args.tokens,
        max_num_seqs=1,
        kv_cache_dtype="fp8" if kv_dtype == FP8 else "auto",
        calculate_kv_scales=calculates_kv_scales,
    )
    runner.allocate_kv_cache(engine_config)
    assert runner.pool is not None
    scales = jax.device_get((runner.pool.k_scale, runner.pool.v_scale))
    text, rng = config.text, np.random.default_rng(0)
    at_T = np.arange(args.tokens, dtype=np.int32)
    rows, global_pages = -(-args.tokens // text.chunk), -(-args.tokens // PAGE)
    local_shape = (text.nope_interval - 1, rows, text.chunk // PAGE)
    local_pages = int(np.prod(local_shape))
    tables = cache.PageTables(
        np.tile(np.arange(global_pages, dtype=np.int32), (rows, 1)),
        global_pages + np.arange(local_pages, dtype=np.int32).reshape(local_shape),
    )
    found = []
    for _ in range(args.prompts):
        tokens_T = rng.integers(0, min(text.vocab, 256), args.tokens).astype(np.int32)
        pool = cache.make_pool(text, global_pages + local_pages, PAGE, kv_dtype)
        pool = cache.PagePool(pool.k, pool.v, *scales)
        batch = cache.Batch(tokens_T, at_T, at_T // text.chunk, tables)
        with activate(runner.layout):
            _, logits_TV = decode.score(runner.params, pool, batch, model=runner.model)
        found.append(np.asarray(jax.nn.log_softmax(logits_TV)))
    return np.concatenate(found)


if __name__ == "__main__":
    main()
