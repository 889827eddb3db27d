"""The training loop: from a plan and a folder to a model, over as many processes as it takes."""

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
from l4jax.text.image import ImageProcessor
from l4jax.train import state
from l4jax.train.batches import Packed, Recipe, make_batch
from l4jax.train.learning import (
    PACKED_AXES,
    Learned,
    Teaching,
    find_loss,
    initialize,
    make_advance,
)
from l4jax.train.metrics import Metrics, write_picture
from l4jax.train.stream import stream_batches
from sharding import STRATEGIES, Layout, make_mesh, prepare_devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a training run's numbers follow from.

    Attributes:
        config: of the model.
        recipe: of the batches.
        teaching: how it learns.
        save_every: steps; there training goes on from what was rounded to be saved.
        note_every: steps that a line of metrics stands for; it divides `save_every`.
    """

    config: Config
    recipe: Recipe
    teaching: Teaching
    save_every: int = 1000
    note_every: int = 25

    def __post_init__(self) -> None:
        if self.save_every % self.note_every:
            raise ValueError(
                f"note_every is {self.note_every}: it must divide save_every, {self.save_every}."
            )

    def describe(self) -> dict[str, Any]:
        """As JSON values, each under one key: what two runs must share to be one."""
        parts = {
            "config": dataclasses.asdict(self.config.text),
            "vision": dataclasses.asdict(self.config.vision) if self.config.vision else {},
            "recipe": {k: v for k, v in vars(self.recipe).items() if k != "folder"},
            "teaching": vars(self.teaching),
        }
        flat = {f"{part}.{k}": v for part, values in parts.items() for k, v in values.items()}
        return flat | {"save_every": self.save_every, "note_every": self.note_every}


def train(
    plan: Plan,
    folder: Path,
    *,
    mesh: str = "1",
    workers: int = 0,
    seconds: float | None = None,
    quiet: bool = False,
) -> Learned:
    """Train to the end, or until the time is up; a folder with a saved state is gone on with.

    Args:
        plan: of the run; the same one each time.
        folder: gets `step-N/`, `metrics.jsonl` and `curves.svg`.
        mesh: devices; rows of the batch over `data`, the inside of layers over `model`.
        workers: processes that make batches; 0 makes them here.
        seconds: that it may take, if it can: it stops at a saved state; None is no limit.
        quiet: no lines on standard output.

    Returns:
        What was learned, as it was saved.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    prepare_devices(mesh)
    layout = Layout(make_mesh(mesh), STRATEGIES["training"])
    levels_C256 = ImageProcessor.from_folder(plan.recipe.folder).levels_C256
    abstract = _shape(plan)
    names = state.name_axes(abstract, declare_parameters(plan.config, np.float32)[1])
    places = layout.place_all(names)
    put = functools.partial(jax.device_put, device=layout.place_all(PACKED_AXES))
    with layout.active():
        learned = state.restore(folder, abstract, names, layout.place, plan.describe())
        if learned is None:
            make = functools.partial(initialize, plan.config, plan.teaching, plan.recipe.seed)
            learned = jax.jit(make, out_shardings=places)()
        # What comes back from files is placed; this makes it so however `widen` left it.
        learned = jax.device_put(learned, places)
        advance = jax.jit(make_advance(plan.config, plan.teaching, levels_C256), donate_argnums=0)
        validate = _make_validation(plan, levels_C256, put)

        def save(learned: Learned) -> tuple[Learned, dict[str, float]]:
            learned = jax.device_put(state.save(folder, learned, plan.describe()), places)
            return learned, validate(learned)

        with stream_batches(plan.recipe, int(learned.step), workers) as batches:
            placed = map(put, batches)
            return follow(
                plan, folder, learned, placed, advance, save, began, seconds=seconds, quiet=quiet
            )


def follow(
    plan: Plan,
    folder: Path,
    learned: Learned,
    batches: Iterator[Packed],
    advance: Callable[[Learned, Packed], tuple[Learned, dict[str, Any]]],
    save: Callable[[Learned], tuple[Learned, dict[str, float]]],
    began: float,
    *,
    seconds: float | None = None,
    quiet: bool = False,
) -> Learned:
    """Learn from one batch after another, with lines of metrics, saving now and then.

    Args:
        plan: what is saved and noted when.
        folder: gets `metrics.jsonl` and `curves.svg`.
        learned: what there is to go on from.
        batches: of the steps that are left.
        advance: a step.
        save: saves what was learned; gives what to go on from, and more to note.
        began: when, by `time.monotonic`, the time began that `seconds` is of.
        seconds, quiet: as `train` has them.

    Returns:
        What was learned, as it was saved.
    """
    start, saved_at = int(learned.step), time.monotonic()
    metrics, notes = Metrics(folder, start), []
    rate_of = plan.teaching.make_schedule()
    for step, packed in enumerate(batches, start + 1):
        learned, noted = advance(learned, packed)
        notes.append(noted)
        is_saved = step % plan.save_every == 0 or step == plan.recipe.steps
        if step % plan.note_every == 0 or is_saved:
            more = {
                "rate": float(np.asarray(rate_of(step))),
                "seconds": time.monotonic() - began,
            }
            if is_saved:
                learned, measured = save(learned)
                more |= measured
            metrics.write(step, jax.device_get(notes), **more)
            _tell(step, plan, notes, more, quiet)
            notes = []
        if is_saved:
            now = time.monotonic()
            # Where the next stretch would take too long, there is none.
            if seconds is not None and 2 * now - saved_at - began > seconds:
                break
            saved_at = now
    write_picture(folder)
    return learned


def load_saved(plan: Plan, folder: Path) -> Learned:
    """What a run saved last, on one device.

    Raises `StateError` where there is nothing, or another plan's.
    """
    abstract = _shape(plan)
    here = SingleDeviceSharding(jax.devices()[0])
    names = state.name_axes(abstract, declare_parameters(plan.config, np.float32)[1])
    learned = state.restore(folder, abstract, names, lambda _: here, plan.describe())
    if learned is None:
        raise state.StateError(f"{folder} holds no saved state: train first.")
    return learned


def _shape(plan: Plan) -> Learned:
    return jax.eval_shape(lambda: initialize(plan.config, plan.teaching, plan.recipe.seed))


def _make_validation(plan: Plan, levels_C256: np.ndarray, put: Any) -> Any:
    """A function that measures what was learned on a batch of the validation split."""
    # One step of one: all is as hard as it gets.
    recipe = dataclasses.replace(plan.recipe, split="validation", steps=1)
    batch: list[Packed] = []
    find = jax.jit(
        functools.partial(
            find_loss, config=plan.config, teaching=plan.teaching, levels_C256=levels_C256
        )
    )

    def validate(learned: Learned) -> dict[str, float]:
        if not batch:
            batch.append(put(make_batch(recipe, 1)))
        _, notes = find(learned.params, batch[0])
        found = {n: float(notes[n]) for n in notes if n == "words" or n.startswith("right")}
        return {f"validation_{name}": x for name, x in found.items() if not math.isnan(x)}

    return validate


def _tell(step: int, plan: Plan, notes: Any, more: Mapping[str, float], quiet: bool) -> None:
    if quiet:
        return
    last = jax.device_get(notes[-1])
    words = {"loss": last["loss"], "right": last["right"], "norm": last["norm"], **more}
    told = ", ".join(f"{name} {float(value):.4g}" for name, value in words.items())
    print(f"step {step} of {plan.recipe.steps}: {told}", flush=True)
