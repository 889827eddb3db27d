"""Tiny models for the tests: loaded from disk once, and run in pieces on a page pool."""

import functools
import json
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from l4jax import cache, checkpoint, decode
from l4jax.config import Config
from l4jax.kernels import PORTABLE, Kernels
from l4jax.model import Llama4, VisionTower
from tests import weights

PAGE = 4
TOKENS, ROWS = (4, 160), (2, 24)  # padded sizes of a piece, so that a model compiles twice


class Tiny(NamedTuple):
    """A model on one device, in float32."""

    config: Config
    params: Any

    def encode(self, pixels_ICYX: np.ndarray) -> np.ndarray:
        """[I * features, D] image features."""
        assert self.config.vision is not None
        tower = VisionTower(self.config.vision, self.config.text.width)
        found = jax.jit(tower.apply)({"params": self.params["vision"]}, pixels_ICYX)
        return np.asarray(found).reshape(-1, self.config.text.width)


@functools.cache
def load_golden(name: str) -> tuple[Tiny, weights.Golden]:
    """Load the model and the golden of a name in `weights.GOLDENS`."""
    golden = weights.read_golden(name)
    return _load(json.dumps(golden.config), golden.weights_seed), golden


def load(raw: dict[str, Any], seed: int = 0) -> Tiny:
    """The model of a config.json, with `weights.random_tensors` of a seed."""
    return _load(json.dumps(raw), seed)


def run_in_pieces(
    tiny: Tiny,
    token_ids: np.ndarray,
    cuts: list[int],
    kernels: Kernels = PORTABLE,
    features_MD: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return [T, V] logits of a prompt that runs in pieces which end at `cuts`, on pages in random
    order.

    As in the engine, local pages are released at the end of a chunk and allocated again. The pool
    is initialized with nan, so that reading an unwritten position is visible.
    """
    text, rng = tiny.config.text, np.random.default_rng(seed)
    pages, chunk = TOKENS[-1] // PAGE, text.chunk // PAGE
    ids = rng.permutation(pages + 2 * 3 * chunk * ROWS[-1])
    global_pages, local_pages = ids[:pages], ids[pages:].reshape(-1, 3, chunk)
    pool = cache.make_pool(text, len(ids), PAGE, jnp.float32)
    pool = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), pool)
    model = Llama4(text, kernels)
    is_patch_T = token_ids == tiny.config.patch_id
    order_T = np.where(is_patch_T, np.cumsum(is_patch_T) - 1, -1)
    logits, start = [], 0
    for stop in [*cuts, len(token_ids)]:
        batch = _make_batch(token_ids[start:stop], start, text.chunk, global_pages, local_pages)
        if features_MD is not None:
            feature_T = np.full(batch.token_T.shape, -1, np.int32)
            feature_T[: stop - start] = order_T[start:stop]
            batch = cache.Batch(
                batch.token_T, batch.position_T, batch.row_T, batch.tables, jnp.asarray(feature_T)
            )
        pool, found_TV = decode.score(tiny.params, pool, batch, features_MD, model=model)
        logits.append(np.asarray(found_TV)[: stop - start])
        start = stop
    return np.concatenate(logits)


def _make_batch(
    token_ids: np.ndarray, start: int, chunk: int, global_pages: np.ndarray, local_pages: np.ndarray
) -> cache.Batch:
    positions = np.arange(start, start + len(token_ids), dtype=np.int32)
    chunks = positions // chunk
    size = next(i for i, tokens in enumerate(TOKENS) if tokens >= len(token_ids))
    tables = cache.PageTables(
        np.tile(global_pages, (ROWS[size], 1)).astype(np.int32),  # type: ignore[arg-type]
        np.zeros((3, ROWS[size], local_pages.shape[2]), np.int32),  # type: ignore[arg-type]
    )
    for row, number in enumerate(np.unique(chunks)):
        # A chunk that continues in the next piece keeps its pages; a new one reuses past pages.
        tables.local_GRB[:, row] = local_pages[number % len(local_pages)]  # type: ignore[index]
    padding = (0, TOKENS[size] - len(token_ids))
    row_T = (chunks - chunks[0]).astype(np.int32) if len(chunks) else chunks
    return cache.Batch(
        np.pad(token_ids.astype(np.int32), padding),  # type: ignore[arg-type]
        np.pad(positions, padding, constant_values=-1),  # type: ignore[arg-type]
        np.pad(row_T, padding),  # type: ignore[arg-type]
        tables,
    )


@functools.cache
def _load(frozen: str, seed: int) -> Tiny:
    raw = json.loads(frozen)
    here = SingleDeviceSharding(jax.devices()[0])
    with tempfile.TemporaryDirectory() as folder:
        weights.write_checkpoint(folder, raw, seed)
        config = checkpoint.load_config(folder)
        params = checkpoint.load(folder, config, jnp.float32, lambda names: here, progress=False)
        return Tiny(config, jax.block_until_ready(params))
