"""Engines on the golden models, loaded once per mesh."""

import functools
import tempfile
from pathlib import Path

from l4jax import checkpoint
from l4jax.cache import PagePool
from l4jax.engine.config import EngineConfig
from l4jax.engine.engine import Engine
from l4jax.engine.request import SamplingParams
from l4jax.engine.runner import Runner
from l4jax.text.image import Tiles
from tests import weights

# Meshes of every strategy besides tensor and data parallelism; see `load_runner`.
STRATEGIES = (
    "seq=2,model=4",
    "2x2 experts",
    "data=2,seq=2,model=2",
    "4 experts",
    "seq=4,model=2",
    "data=2,seq=2 experts",
    "seq=2,model=2 experts",
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


@functools.cache
def load_runner(name: str, mesh: str) -> Runner:
    """Load a float32 runner with the weights of a golden; each engine allocates its KV cache.

    A mesh like "8 experts" is expert parallel.
    """
    shape, _, strategy = mesh.partition(" ")
    golden = weights.read_golden(name)
    with tempfile.TemporaryDirectory() as folder:
        weights.write_checkpoint(folder, golden.config, golden.weights_seed)
        runner = Runner(
            checkpoint.load_config(folder),
            shape,
            "float32",
            enable_expert_parallel=strategy == "experts",
        )
        runner.load(Path(folder), progress=False)
    return runner


def make_engine(name: str, mesh: str = "1", **engine_args) -> Engine:
    """Make an engine with an empty KV cache."""
    defaults = {
        "max_model_len": 256,
        "max_num_seqs": 4,
        "block_size": 4,
        "max_num_batched_tokens": 64,
    }
    runner = load_runner(name, mesh)
    return Engine(runner, EngineConfig(**{**defaults, **engine_args}))


def get_pool(runner: Runner) -> PagePool:
    """Return the KV cache of a runner that has one."""
    assert runner.pool is not None
    return runner.pool


def run_all(engine: Engine, max_steps: int = 2000) -> dict[int, list[int]]:
    """Run all requests to their ends; return their output tokens."""
    found: dict[int, list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return found
        for update in engine.step():
            found.setdefault(update.request_id, []).extend(update.token_ids)
    raise AssertionError(f"not done after {max_steps} steps")


def find_tiles(golden: weights.Golden) -> tuple[Tiles, ...]:
    """Return the image of a golden: one row of two tiles, and the whole image."""
    return () if golden.pixels is None else (Tiles(golden.pixels, 1, 2),)


def assert_all_free(engine: Engine) -> None:
    """Assert that all pages, feature slots and request slots are free."""
    engine.step()  # the pending step of requests that ended
    for pages in engine.scheduler.pages:
        assert pages.free == pages.size
    assert engine.scheduler.features.free == engine.limits.feature_slots
    assert all(slots.free == slots.size for slots in engine.scheduler.slots)
    assert not engine.scheduler.running and not engine.scheduler.waiting
