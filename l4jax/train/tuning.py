"""LoRA on a checkpoint: its weights stay as they are, and two factors beside each are learned."""

import dataclasses
import functools
import re
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import axes, checkpoint
from l4jax.checkpoint.adapter import Adapter, adapt, name_factors, shape_factors
from l4jax.checkpoint.parameters import flatten, unflatten
from l4jax.config import Config
from l4jax.engine.runner import check_mesh
from l4jax.kernels.formats import Adapted
from l4jax.model import Parameters, declare_parameters
from l4jax.text.image import ImageProcessor
from l4jax.train import state
from l4jax.train.conversations import make_batches
from l4jax.train.documents import Document
from l4jax.train.kernels import make_lean_kernels
from l4jax.train.learning import PACKED_AXES, Learned, find_loss, make_update
from l4jax.train.run import Plan, follow
from sharding import STRATEGIES, Layout, make_mesh, prepare_devices

TARGETS = (
    "attention",
    "shared_expert",
    "experts",
    "dense",
)  # what may be adapted: layers' matrices


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All that a run's numbers follow from.

    Attributes:
        plan: as for training from nothing; `recipe.folder` is the model's.
        data: a digest of the conversations.
        rank, alpha: of the adapter.
        targets: of `TARGETS`.
    """

    plan: Plan
    data: str
    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: it must be at least 1.")
        if strange := [name for name in self.targets if name not in TARGETS]:
            raise ValueError(f"targets has {strange[0]!r}: they are {', '.join(TARGETS)}.")
        if not self.find_targets():
            raise ValueError(f"targets is {self.targets}: the model has no such parameters.")

    def describe(self) -> dict[str, Any]:
        """As JSON values, each under one key: what two runs must share to be one."""
        own = {name: getattr(self, name) for name in ("data", "rank", "alpha")}
        model = self.plan.recipe.folder.name
        return self.plan.describe() | own | {"model": model, "targets": list(self.targets)}

    def find_targets(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """What is adapted: path -> shape, and the logical names of axes."""
        declared, named = declare_parameters(self.plan.config, jnp.float32)
        names = flatten(named)
        return {
            path: (leaf.shape, names[path])
            for path, leaf in flatten(declared).items()
            if find_target(path, names[path]) in self.targets
        }

    def name_factors(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """The logical names of the axes of all factors."""
        return {
            path: name_factors(path, shape, names)
            for path, (shape, names) in self.find_targets().items()
        }

    def initialize(self) -> Learned:
        """Factors that add nothing yet: the first ones random, the second ones zero."""
        seed = jax.random.key(self.plan.recipe.seed)
        factors = {}
        for path, (shape, _) in self.find_targets().items():
            shapes = shape_factors(path, shape, self.rank)
            assert shapes is not None, path
            summed = int(np.prod(shapes[0][len(shapes[1]) :]))
            key = jax.random.fold_in(seed, zlib.crc32(path.encode()))
            first = jax.random.uniform(key, shapes[0], minval=-1, maxval=1) * summed**-0.5
            factors[path] = {"first": first, "second": jnp.zeros(shapes[1])}
        moments = self.plan.teaching.make_optimizer().init(factors)
        return Learned(factors, moments, jnp.int32(0))

    def make_adapter(self, learned: Learned) -> Adapter:
        """What was learned, as a value on the host."""
        return Adapter(self.rank, self.alpha, jax.device_get(learned.params))


def find_target(path: str, names: tuple[str, ...]) -> str | None:
    """Which of `TARGETS` a parameter, with axes of these names, belongs to; None if to none."""
    found = re.fullmatch(r"text/layer_\d+/(attention|feed_forward)/(shared/)?(\w+)", path)
    if not found or found[3] == "router":
        return None
    if found[1] == "attention":
        return "attention"
    if found[2]:
        return "shared_expert"
    return "experts" if axes.EXPERTS in names else "dense"


def apply(base: Parameters, factors: Any, scale: float) -> Parameters:
    """The parameters with an adapter beside them, which the model computes with as they are."""
    leaves = flatten(base)
    for path, its in factors.items():
        weight = leaves[path]
        leaves[path] = Adapted(weight, *adapt(path, weight.shape, its, scale))
    return unflatten(leaves)


def tune(
    tuning: Tuning,
    documents: Sequence[Document],
    folder: Path,
    *,
    model: str,
    mesh: str = "1",
    quiet: bool = False,
) -> Adapter:
    """Learn an adapter; a folder with a saved state is gone on with.

    Args:
        tuning: of the run; the same one each time.
        documents: that it learns from.
        folder: gets the adapter, in PEFT's layout, each time that the state is saved in `step-N/`;
            `metrics.jsonl` and `curves.svg`.
        model: what the adapter says that it belongs to.
        mesh: devices; rows of the batch over `data`, the inside of layers over `model`.
        quiet: no lines on standard output.

    Raises:
        ValueError: for a checkpoint or a mesh that cannot be had; another run's folder; a quantized
            checkpoint.
    """
    began = time.monotonic()
    plan, config = tuning.plan, tuning.plan.config
    source, dtype = plan.recipe.folder, jnp.dtype(plan.teaching.dtype)
    if found := checkpoint.find_quantization(source):
        raise checkpoint.CheckpointError(
            f"{source} is quantized ({found}): adapters are learned beside BF16 or F32; take that "
            "checkpoint."
        )
    folder.mkdir(parents=True, exist_ok=True)
    prepare_devices(mesh)
    layout = Layout(make_mesh(mesh), STRATEGIES["training"])
    check_mesh(config, layout)
    layout.check(axes.ROWS, plan.recipe.rows, "rows of a batch")
    base = checkpoint.load(source, config, dtype, layout.place, progress=not quiet)
    abstract = jax.eval_shape(tuning.initialize)
    names = state.name_axes(abstract, tuning.name_factors())
    places = layout.place_all(names)
    put = functools.partial(jax.device_put, device=layout.place_all(PACKED_AXES))
    about = tuning.describe()

    def save(learned: Learned) -> tuple[Learned, dict[str, float]]:
        learned = state.save(folder, learned, about, state.keep)
        checkpoint.write_adapter(folder, tuning.make_adapter(learned), config, model)
        return jax.device_put(learned, places), {}

    with layout.active():
        learned = state.restore(folder, abstract, names, layout.place, about, state.keep)
        if learned is None:
            learned = jax.jit(tuning.initialize, out_shardings=places)()
        update = jax.jit(make_update(_make_loss(tuning), plan.teaching), donate_argnums=0)
        batches = map(put, make_batches(documents, plan.recipe, int(learned.step)))
        learned = follow(
            plan,
            folder,
            learned,
            batches,
            lambda learned, packed: update(learned, packed, base),
            save,
            began,
            quiet=quiet,
        )
    return tuning.make_adapter(learned)


def make_processor(config: Config, folder: Path) -> ImageProcessor | None:
    """What cuts pictures for a model; None for one that sees none."""
    if config.vision is None:
        return None
    return ImageProcessor.from_folder(
        folder, image_size=config.vision.tile, patch_size=config.vision.patch
    )


def _make_loss(tuning: Tuning) -> Any:
    """The loss of factors, a batch and the weights that stay as they are."""
    plan = tuning.plan
    processor = make_processor(plan.config, plan.recipe.folder) or ImageProcessor()
    kernels = make_lean_kernels(plan.recipe.chunk, plan.teaching.attention)
    scale = tuning.alpha / tuning.rank

    def find(factors: Any, packed: Any, base: Parameters) -> Any:
        params = apply(base, factors, scale)
        loss, notes = find_loss(
            params, packed, plan.config, plan.teaching, processor.levels_C256, kernels
        )
        return loss, {name: notes[name] for name in notes if not name.startswith("right_")}

    return find
