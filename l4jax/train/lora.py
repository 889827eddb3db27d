"""LoRA training: adapters of a checkpoint whose weights stay frozen."""

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
from l4jax.checkpoint.adapter import Adapter, expand_factors, name_factors, shape_factors
from l4jax.checkpoint.parameters import flatten, unflatten
from l4jax.config import Config
from l4jax.kernels.formats import Adapted
from l4jax.model import Parameters, declare_parameters
from l4jax.strategies import STRATEGIES, activate, check_mesh
from l4jax.text.image import ImageProcessor
from l4jax.train import saved_state
from l4jax.train.conversations import make_batches
from l4jax.train.documents import Document
from l4jax.train.kernels import make_remat_kernels
from l4jax.train.train_step import PACKED_AXES, TrainState, compute_loss, make_step
from l4jax.train.trainer import TrainingConfig, run_steps
from sharding import Layout, make_mesh, prepare_devices

# Groups of the layers' matrices that an adapter may target.
TARGETS = ("attention", "shared_expert", "experts", "dense")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The configuration of a LoRA training run; all its numbers follow from it.

    Attributes:
        training: as for training from scratch; `data.folder` is the model's.
        dataset: a digest of the conversations.
        rank, alpha: of the adapter.
        targets: some of `TARGETS`.
    """

    training: TrainingConfig
    dataset: str
    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: it must be at least 1.")
        if strange := [name for name in self.targets if name not in TARGETS]:
            raise ValueError(f"targets has {strange[0]!r}: they are {', '.join(TARGETS)}.")
        if not self.list_targets():
            raise ValueError(f"targets is {self.targets}: the model has no such parameters.")

    def describe(self) -> dict[str, Any]:
        """Flatten the configuration to JSON values; a resumed run must have the same."""
        return self.training.describe() | {
            "data": self.dataset,
            "rank": self.rank,
            "alpha": self.alpha,
            "model": self.training.data.folder.name,
            "targets": list(self.targets),
        }

    def list_targets(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """List the adapted parameters: path -> shape and logical axis names."""
        declared, named = declare_parameters(self.training.model, jnp.float32)
        names = flatten(named)
        return {
            path: (leaf.shape, names[path])
            for path, leaf in flatten(declared).items()
            if classify_target(path, names[path]) in self.targets
        }

    def name_factors(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Name the logical axes of all factors."""
        return {
            path: name_factors(path, shape, names)
            for path, (shape, names) in self.list_targets().items()
        }

    def initialize(self) -> TrainState:
        """Make the initial state: random first factors and zero second ones, product zero."""
        seed = jax.random.key(self.training.data.seed)
        factors = {}
        for path, (shape, _) in self.list_targets().items():
            shapes = shape_factors(path, shape, self.rank)
            assert shapes is not None, path
            summed = int(np.prod(shapes[0][len(shapes[1]) :]))
            key = jax.random.fold_in(seed, zlib.crc32(path.encode()))
            first = jax.random.uniform(key, shapes[0], minval=-1, maxval=1) * summed**-0.5
            factors[path] = {"first": first, "second": jnp.zeros(shapes[1])}
        moments = self.training.hparams.make_optimizer().init(factors)
        return TrainState(factors, moments, jnp.int32(0))

    def make_adapter(self, state: TrainState) -> Adapter:
        """Copy the trained factors to the host as an adapter."""
        return Adapter(self.rank, self.alpha, jax.device_get(state.params))


def classify_target(path: str, names: tuple[str, ...]) -> str | None:
    """Return the group of `TARGETS` of a parameter with these axis names, or None."""
    match = re.fullmatch(r"text/layer_\d+/(attention|feed_forward)/(shared/)?(\w+)", path)
    if not match or match[3] == "router":
        return None
    if match[1] == "attention":
        return "attention"
    if match[2]:
        return "shared_expert"
    return "experts" if axes.EXPERTS in names else "dense"


def apply_adapter(base: Parameters, factors: Any, scale: float) -> Parameters:
    """Attach an adapter to the parameters: the model computes with `Adapted` weights."""
    leaves = flatten(base)
    for path, pair in factors.items():
        weight = leaves[path]
        leaves[path] = Adapted(weight, *expand_factors(path, weight.shape, pair, scale))
    return unflatten(leaves)


def train_adapter(
    lora_config: LoraConfig,
    documents: Sequence[Document],
    folder: Path,
    *,
    model: str,
    mesh: str = "1",
    quiet: bool = False,
) -> Adapter:
    """Train an adapter; resume from the newest saved state in the folder.

    Args:
        lora_config: the configuration; the same each time.
        documents: the training data.
        folder: the run's folder, for `step-N/`, `metrics.jsonl` and `curves.svg`; each save also
            writes the adapter there, in PEFT's layout.
        model: the base model's name in the adapter's config.
        mesh: devices; `data` shards the rows of a batch, `model` shards the layers.
        quiet: print no progress.

    Raises:
        ValueError: the checkpoint is missing or quantized, the mesh does not fit, or the folder
            belongs to another run.
    """
    began = time.monotonic()
    training, config = lora_config.training, lora_config.training.model
    source, dtype = training.data.folder, jnp.dtype(training.hparams.dtype)
    if quantization := checkpoint.detect_quantization(source):
        raise checkpoint.CheckpointError(
            f"{source} is quantized ({quantization}): adapters are trained on BF16 or F32 "
            "weights; take that checkpoint."
        )
    folder.mkdir(parents=True, exist_ok=True)
    prepare_devices(mesh)
    layout = Layout(make_mesh(mesh), STRATEGIES["training"])
    check_mesh(config, layout)
    layout.check(axes.ROWS, training.data.rows, "rows of a batch")
    base = checkpoint.load(source, config, dtype, layout.place, progress=not quiet)
    abstract = jax.eval_shape(lora_config.initialize)
    names = saved_state.name_axes(abstract, lora_config.name_factors())
    shardings = layout.place_all(names)
    put = functools.partial(jax.device_put, device=layout.place_all(PACKED_AXES))
    settings = lora_config.describe()

    def write(state: TrainState) -> None:
        checkpoint.write_adapter(folder, lora_config.make_adapter(state), config, model)

    def save(state: TrainState) -> tuple[TrainState, dict[str, float]]:
        state = saved_state.save(folder, state, settings, saved_state.keep_exact)
        write(state)
        return jax.device_put(state, shardings), {}

    with activate(layout):
        state = saved_state.restore(
            folder, abstract, names, layout.place, settings, saved_state.keep_exact
        )
        if state is None:
            state = jax.jit(lora_config.initialize, out_shardings=shardings)()
        else:
            write(state)  # a run killed after it saved the state left an older adapter, or none
        step = make_step(_make_loss(lora_config), training.hparams)
        train_step = jax.jit(step, donate_argnums=0)
        batches = map(put, make_batches(documents, training.data, int(state.step)))
        state = run_steps(
            training,
            folder,
            state,
            batches,
            lambda state, packed: train_step(state, packed, base),
            save,
            began,
            quiet=quiet,
        )
    return lora_config.make_adapter(state)


def make_processor(config: Config, folder: Path) -> ImageProcessor | None:
    """Make the image processor of a model; None for a model without vision."""
    if config.vision is None:
        return None
    return ImageProcessor.from_folder(
        folder, image_size=config.vision.tile, patch_size=config.vision.patch
    )


def _make_loss(lora_config: LoraConfig) -> Any:
    """Make the loss function of the factors, a batch and the frozen weights."""
    training = lora_config.training
    processor = make_processor(training.model, training.data.folder) or ImageProcessor()
    kernels = make_remat_kernels(training.data.chunk, training.hparams.attention)
    scale = lora_config.alpha / lora_config.rank

    def compute(factors: Any, packed: Any, base: Parameters) -> Any:
        params = apply_adapter(base, factors, scale)
        loss, metrics = compute_loss(
            params, packed, training.model, training.hparams, processor.levels_C256, kernels
        )
        return loss, {name: metrics[name] for name in metrics if not name.startswith("right_")}

    return compute
