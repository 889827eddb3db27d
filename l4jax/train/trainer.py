"""The training loop: train a model from a configuration, in as many processes as necessary."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from l4jax.config import Config
from l4jax.model import declare_parameters
from l4jax.strategies import STRATEGIES, activate
from l4jax.text.image import ImageProcessor
from l4jax.train import saved_state
from l4jax.train.batches import DataConfig, PackedBatch, make_batch
from l4jax.train.data_loader import stream_batches
from l4jax.train.metrics import Metrics, write_curves
from l4jax.train.train_step import (
    PACKED_AXES,
    Hyperparameters,
    TrainState,
    compute_loss,
    initialize,
    make_train_step,
)
from sharding import Layout, make_mesh, prepare_devices


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The configuration of a training run; all its numbers follow from it.

    Attributes:
        model: the model's config.
        data: the batches.
        hparams: loss, optimizer and precision.
        save_every: steps between saved states; training continues from the rounded state.
        note_every: steps per line of metrics; a divisor of `save_every`.
    """

    model: Config
    data: DataConfig
    hparams: Hyperparameters
    save_every: int = 1000
    note_every: int = 25

    def __post_init__(self) -> None:
        if self.save_every % self.note_every:
            raise ValueError(
                f"note_every is {self.note_every}: it must divide save_every, {self.save_every}."
            )

    def describe(self) -> dict[str, Any]:
        """Flatten the configuration to JSON values; a resumed run must have the same."""
        parts = {
            "config": dataclasses.asdict(self.model.text),
            "vision": dataclasses.asdict(self.model.vision) if self.model.vision else {},
            "data": {k: v for k, v in vars(self.data).items() if k != "folder"},
            "hparams": vars(self.hparams),
        }
        flat = {f"{part}.{k}": v for part, values in parts.items() for k, v in values.items()}
        return flat | {"save_every": self.save_every, "note_every": self.note_every}


def train(
    training: TrainingConfig,
    folder: Path,
    *,
    mesh: str = "1",
    workers: int = 0,
    seconds: float | None = None,
    quiet: bool = False,
) -> TrainState:
    """Train to the last step or until the time limit; resume from the newest saved state.

    Args:
        training: the configuration; the same each time.
        folder: the run's folder, for `step-N/`, `metrics.jsonl` and `curves.svg`.
        mesh: devices; `data` shards the rows of a batch, `model` shards the layers.
        workers: processes that make batches; 0 makes them in this process.
        seconds: time limit; training stops at the last saved state that fits. None is no limit.
        quiet: print no progress.

    Returns:
        The training state, as saved.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    prepare_devices(mesh)
    layout = Layout(make_mesh(mesh), STRATEGIES["training"])
    levels_C256 = ImageProcessor.from_folder(training.data.folder).levels_C256
    abstract = _eval_shape(training)
    names = saved_state.name_axes(abstract, declare_parameters(training.model, np.float32)[1])
    shardings = layout.place_all(names)
    put = functools.partial(jax.device_put, device=layout.place_all(PACKED_AXES))
    with activate(layout):
        state = saved_state.restore(folder, abstract, names, layout.place, training.describe())
        if state is None:
            make = functools.partial(
                initialize, training.model, training.hparams, training.data.seed
            )
            state = jax.jit(make, out_shardings=shardings)()
        # Restored arrays are sharded, but `dequantize_state` may have changed their shardings.
        state = jax.device_put(state, shardings)
        step = make_train_step(training.model, training.hparams, levels_C256)
        train_step = jax.jit(step, donate_argnums=0)
        validate = _make_validation(training, levels_C256, put)

        def save(state: TrainState) -> tuple[TrainState, dict[str, float]]:
            rounded = saved_state.save(folder, state, training.describe())
            state = jax.device_put(rounded, shardings)
            return state, validate(state)

        with stream_batches(training.data, int(state.step), workers) as batches:
            batches = map(put, batches)
            return run_steps(
                *(training, folder, state, batches, train_step, save, began),
                seconds=seconds,
                quiet=quiet,
            )


def run_steps(
    training: TrainingConfig,
    folder: Path,
    state: TrainState,
    batches: Iterator[PackedBatch],
    train_step: Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, Any]]],
    save: Callable[[TrainState], tuple[TrainState, dict[str, float]]],
    began: float,
    *,
    seconds: float | None = None,
    quiet: bool = False,
) -> TrainState:
    """Train on one batch after another; write metrics and save at intervals.

    Args:
        training: the intervals and the learning rate schedule.
        folder: the run's folder, for `metrics.jsonl` and `curves.svg`.
        state: the initial state.
        batches: the batches of the remaining steps.
        train_step: state and batch -> new state and metrics.
        save: saves the state; returns the state to continue from and more metrics.
        began: the start of the time limit, by `time.monotonic`.
        seconds, quiet: as for `train`.

    Returns:
        The training state, as saved.
    """
    start, saved_at = int(state.step), time.monotonic()
    metrics, pending = Metrics(folder, start), []
    learning_rate = training.hparams.make_schedule()
    for step, packed in enumerate(batches, start + 1):
        state, step_metrics = train_step(state, packed)
        pending.append(step_metrics)
        is_saved = step % training.save_every == 0 or step == training.data.steps
        if step % training.note_every == 0 or is_saved:
            more = {
                "rate": float(np.asarray(learning_rate(step))),
                "seconds": time.monotonic() - began,
            }
            if is_saved:
                state, measured = save(state)
                more |= measured
            metrics.write(step, jax.device_get(pending), **more)
            if not quiet:
                _print_progress(step, training.data.steps, pending[-1], more)
            pending = []
        if is_saved:
            now = time.monotonic()
            # Stop if the steps to the next saved state would exceed the time limit.
            if seconds is not None and 2 * now - saved_at - began > seconds:
                break
            saved_at = now
    write_curves(folder)
    return state


def load_saved(training: TrainingConfig, folder: Path) -> TrainState:
    """Load the newest saved state of a run onto one device.

    Raises:
        StateError: the folder has no saved state, or the state of another configuration.
    """
    abstract = _eval_shape(training)
    device = SingleDeviceSharding(jax.devices()[0])
    names = saved_state.name_axes(abstract, declare_parameters(training.model, np.float32)[1])
    state = saved_state.restore(folder, abstract, names, lambda _: device, training.describe())
    if state is None:
        raise saved_state.StateError(f"{folder} holds no saved state: train first.")
    return state


def _eval_shape(training: TrainingConfig) -> TrainState:
    return jax.eval_shape(lambda: initialize(training.model, training.hparams, training.data.seed))


def _make_validation(training: TrainingConfig, levels_C256: np.ndarray, put: Any) -> Any:
    """Make a function that measures a state on one batch of the validation split."""
    # The last of one step has the final mix and the hardest charts.
    data = dataclasses.replace(training.data, split="validation", steps=1)
    cached: list[PackedBatch] = []
    loss = functools.partial(
        compute_loss, config=training.model, hparams=training.hparams, levels_C256=levels_C256
    )
    loss = jax.jit(loss)

    def validate(state: TrainState) -> dict[str, float]:
        if not cached:
            cached.append(put(make_batch(data, 1)))
        _, metrics = loss(state.params, cached[0])
        kept = {n: float(metrics[n]) for n in metrics if n == "words" or n.startswith("right")}
        return {f"validation_{name}": x for name, x in kept.items() if not math.isnan(x)}

    return validate


def _print_progress(
    step: int, steps: int, metrics: Mapping[str, Any], more: Mapping[str, float]
) -> None:
    last = jax.device_get(metrics)
    shown = {"loss": last["loss"], "right": last["right"], "norm": last["norm"], **more}
    text = ", ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
    print(f"step {step} of {steps}: {text}", flush=True)
