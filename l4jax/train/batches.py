"""Documents packed into rows of tokens, so that chunks of the model lie on blocks of the row.

A document stands within one block of `chunk` tokens, or begins at the start of one: then its own
chunk boundaries are the row's, and a local layer attends block by block.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from l4jax.train.documents import KINDS, SEEN_WEIGHT, Document, Speller, draw_example

FAILURES = 6  # documents in a row that find no room: then a batch counts as full
SHORTEST = 8  # tokens of a document, at least: bounds the runs of a batch

Leaf: TypeAlias = Any  # numpy here; arrays or tracers in a step, and the names of axes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a batch follows from, its number aside.

    Attributes:
        folder: with the tokenizer and the image processor.
        seed: of everything drawn.
        steps: of the whole training: what is easy comes first.
        rows, length: of a batch, in tokens; `length` is a multiple of `chunk`.
        chunk: of the model.
        tiles: of pictures in a batch, at most.
        features: that a tile becomes.
        split: that examples are from.
    """

    folder: Path
    seed: int
    steps: int
    rows: int
    length: int
    chunk: int
    tiles: int
    features: int
    split: str = "train"

    def __post_init__(self) -> None:
        if self.length % self.chunk:
            raise ValueError(
                f"length is {self.length}: it must be a multiple of the chunk, {self.chunk}."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A batch. Rows of tokens one behind the other: T = rows * length.

    A run is what `l4jax.cache` calls a row: tokens of one document inside one chunk.

    Attributes:
        token_T, position_T: int32; the position counts within the document, -1 is padding.
        run_T: int32 run of each token.
        first_RB: int32, the first run of each run's document, in all B = length / chunk columns.
        target_T: int32, the token that comes next; of an image feature the one written there.
        weight_T: float32, how much the loss counts whether it is foretold.
        kind_T: int32, which of `documents.KINDS` the document is; -1 is padding, or another.
        feature_T: int32 index into the image features, -1 for text.
        tiles_ICYX: uint8 pixels.
    """

    token_T: Leaf
    position_T: Leaf
    run_T: Leaf
    first_RB: Leaf
    target_T: Leaf
    weight_T: Leaf
    kind_T: Leaf
    feature_T: Leaf
    tiles_ICYX: Leaf


def make_batch(recipe: Recipe, step: int) -> Packed:
    """The batch of a step: the same on every machine, whatever was made before."""
    speller = _open_speller(recipe.folder)
    rng = random.Random(f"{recipe.seed} {recipe.split} {step}")
    longest = recipe.length // recipe.chunk - 1
    places: list[tuple[int, Document]] = []
    filled, tiles, failures = [0] * (recipe.rows * recipe.length // recipe.chunk), 0, 0
    while failures < FAILURES:
        example = draw_example(
            rng, recipe.split, step / recipe.steps, speller, recipe.chunk, longest
        )
        document = speller(example)
        start = find_room(filled, len(document.token_T), recipe)
        if start is None or tiles + len(document.tiles_ICYX) > recipe.tiles:
            failures += 1
            continue
        failures, tiles = 0, tiles + len(document.tiles_ICYX)
        fill(filled, start, len(document.token_T), recipe.chunk)
        places.append((start, document))
    return pack(places, recipe, speller.processor.tile)


def pack(places: Sequence[tuple[int, Document]], recipe: Recipe, tile: int) -> Packed:
    """Documents at their places among the tokens, as a batch."""
    size = recipe.rows * recipe.length
    token_T, position_T, document_T = np.zeros(size, np.int32), np.full(size, -1), np.full(size, -1)
    target_T, weight_T = np.zeros(size, np.int32), np.zeros(size, np.float32)
    kind_T, feature_T = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
    tiles_ICYX = np.zeros((recipe.tiles, 3, tile, tile), np.uint8)
    used = 0
    for number, (start, document) in enumerate(places):
        count = len(document.token_T)
        at = slice(start, start + count)
        token_T[at], position_T[at], document_T[at] = document.token_T, np.arange(count), number
        # The token at t foretells the one at t + 1.
        target_T[start : start + count - 1] = document.token_T[1:]
        weight_T[start : start + count - 1] = document.weight_T[1:]
        is_seen_T = document.seen_T >= 0
        target_T[at][is_seen_T] = document.seen_T[is_seen_T]
        weight_T[at][is_seen_T] = SEEN_WEIGHT
        kind_T[at] = KINDS.index(document.kind) if document.kind in KINDS else -1
        is_patch_T = document.feature_T >= 0
        feature_T[at][is_patch_T] = document.feature_T[is_patch_T] + used * recipe.features
        tiles_ICYX[used : used + len(document.tiles_ICYX)] = document.tiles_ICYX
        used += len(document.tiles_ICYX)
    run_T, first_R = _find_runs(position_T, document_T, recipe.chunk)
    blocks = recipe.length // recipe.chunk
    return Packed(
        token_T,
        position_T.astype(np.int32),
        run_T,
        np.tile(first_R[:, None], (1, blocks)),
        target_T,
        weight_T,
        kind_T,
        feature_T,
        tiles_ICYX,
    )


def _find_runs(
    position_T: np.ndarray, document_T: np.ndarray, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """The run of each token, and of each run the first one of its document."""
    is_real_T = position_T >= 0
    is_first_T = is_real_T & (position_T % chunk == 0)
    run_T = np.maximum(np.cumsum(is_first_T) - 1, 0).astype(np.int32)
    first_R = np.arange(-(-len(run_T) // SHORTEST), dtype=np.int32)
    start_T = is_real_T & (position_T == 0)
    first_of_document = dict(zip(document_T[start_T], run_T[start_T], strict=True))
    for at in np.flatnonzero(is_first_T):
        first_R[run_T[at]] = first_of_document[document_T[at]]
    return run_T, first_R


def find_room(filled: list[int], tokens: int, recipe: Recipe) -> int | None:
    """Where so many tokens fit, as the place of the first; None if nowhere."""
    chunk, blocks = recipe.chunk, recipe.length // recipe.chunk
    needed = -(-tokens // chunk)
    for block, taken in enumerate(filled):
        if needed == 1:
            if taken + tokens <= chunk:
                return block * chunk + taken
        elif block % blocks + needed <= blocks and not any(filled[block : block + needed]):
            return block * chunk
    return None


def fill(filled: list[int], start: int, tokens: int, chunk: int) -> None:
    """Note that so many tokens from `start` on are taken."""
    while tokens > 0:
        block, taken = divmod(start, chunk)
        part = min(tokens, chunk - taken)
        filled[block] += part
        start, tokens = start + part, tokens - part


@functools.cache
def _open_speller(folder: Path) -> Speller:
    return Speller.from_folder(folder)
