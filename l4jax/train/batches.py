"""Batch packing: documents in rows of tokens, with attention chunks aligned to blocks of the row.

A document is inside one block of `chunk` tokens, or begins at the start of a block. Its own chunk
boundaries are then the row's, and a local layer attends block by block.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from l4jax.train.documents import (
    KINDS,
    PATCH_TARGET_WEIGHT,
    Document,
    ExampleEncoder,
    sample_example,
)

MAX_FAILURES = 6  # successive documents without space, after which a batch is full
MIN_TOKENS = 8  # per document; bounds the segments of a batch

Leaf: TypeAlias = Any  # numpy here; jax arrays, tracers or axis names elsewhere


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The configuration of the batches; a batch follows from it and the step.

    Attributes:
        folder: of the tokenizer and the image processor.
        seed: of all random choices.
        steps: of the whole run; easy examples come first.
        rows: of a batch.
        length: tokens of a row, a multiple of `chunk`.
        chunk: the model's attention chunk, in tokens.
        tiles: image tiles of a batch, at most.
        features: image features per tile.
        split: of the examples.
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
class PackedBatch:
    """A batch of packed documents; its rows are concatenated, T = rows * length.

    A segment is the tokens of one document inside one chunk: a row of `l4jax.cache`.

    Attributes:
        token_T, position_T: int32; the position counts within the document, -1 is padding.
        segment_T: int32 segment of each token.
        first_RB: int32, the first segment of each segment's document, in all B = length / chunk
            columns.
        target_T: int32, the next token; for an image feature, the token drawn there.
        weight_T: float32, the target's weight in the loss.
        kind_T: int32 index into `documents.KINDS`; -1 is padding, or another kind.
        feature_T: int32 index into the image features, -1 for text.
        tiles_ICYX: uint8 pixels.
    """

    token_T: Leaf
    position_T: Leaf
    segment_T: Leaf
    first_RB: Leaf
    target_T: Leaf
    weight_T: Leaf
    kind_T: Leaf
    feature_T: Leaf
    tiles_ICYX: Leaf


def make_batch(data: DataConfig, step: int) -> PackedBatch:
    """Make the batch of a step: the same on every machine, independent of other batches."""
    encoder = _open_encoder(data.folder)
    rng = random.Random(f"{data.seed} {data.split} {step}")
    longest = data.length // data.chunk - 1
    placements: list[tuple[int, Document]] = []
    filled, tiles, failures = [0] * (data.rows * data.length // data.chunk), 0, 0
    while failures < MAX_FAILURES:
        example = sample_example(rng, data.split, step / data.steps, encoder, data.chunk, longest)
        document = encoder(example)
        start = find_space(filled, len(document.token_T), data)
        if start is None or tiles + len(document.tiles_ICYX) > data.tiles:
            failures += 1
            continue
        failures, tiles = 0, tiles + len(document.tiles_ICYX)
        reserve(filled, start, len(document.token_T), data.chunk)
        placements.append((start, document))
    return pack(placements, data, encoder.processor.tile)


def pack(placements: Sequence[tuple[int, Document]], data: DataConfig, tile: int) -> PackedBatch:
    """Pack documents into a batch at their first tokens' indices."""
    size = data.rows * data.length
    token_T, position_T, document_T = np.zeros(size, np.int32), np.full(size, -1), np.full(size, -1)
    target_T, weight_T = np.zeros(size, np.int32), np.zeros(size, np.float32)
    kind_T, feature_T = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
    tiles_ICYX = np.zeros((data.tiles, 3, tile, tile), np.uint8)
    used = 0
    for number, (start, document) in enumerate(placements):
        count = len(document.token_T)
        at = slice(start, start + count)
        token_T[at], position_T[at], document_T[at] = document.token_T, np.arange(count), number
        # The target at t is the token at t + 1.
        target_T[start : start + count - 1] = document.token_T[1:]
        weight_T[start : start + count - 1] = document.weight_T[1:]
        is_patch_target_T = document.patch_target_T >= 0
        target_T[at][is_patch_target_T] = document.patch_target_T[is_patch_target_T]
        weight_T[at][is_patch_target_T] = PATCH_TARGET_WEIGHT
        kind_T[at] = KINDS.index(document.kind) if document.kind in KINDS else -1
        is_patch_T = document.feature_T >= 0
        feature_T[at][is_patch_T] = document.feature_T[is_patch_T] + used * data.features
        tiles_ICYX[used : used + len(document.tiles_ICYX)] = document.tiles_ICYX
        used += len(document.tiles_ICYX)
    segment_T, first_R = _compute_segments(position_T, document_T, data.chunk)
    blocks = data.length // data.chunk
    return PackedBatch(
        token_T,
        position_T.astype(np.int32),
        segment_T,
        np.tile(first_R[:, None], (1, blocks)),
        target_T,
        weight_T,
        kind_T,
        feature_T,
        tiles_ICYX,
    )


def _compute_segments(
    position_T: np.ndarray, document_T: np.ndarray, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the segment of each token, and each segment's first segment of its document."""
    is_real_T = position_T >= 0
    is_first_T = is_real_T & (position_T % chunk == 0)
    segment_T = np.maximum(np.cumsum(is_first_T) - 1, 0).astype(np.int32)
    first_R = np.arange(-(-len(segment_T) // MIN_TOKENS), dtype=np.int32)
    start_T = is_real_T & (position_T == 0)
    first_of_document = dict(zip(document_T[start_T], segment_T[start_T], strict=True))
    for at in np.flatnonzero(is_first_T):
        first_R[segment_T[at]] = first_of_document[document_T[at]]
    return segment_T, first_R


def find_space(filled: list[int], tokens: int, data: DataConfig) -> int | None:
    """Find space for a number of tokens; return the first index, or None."""
    chunk, blocks = data.chunk, data.length // data.chunk
    needed = -(-tokens // chunk)
    for block, taken in enumerate(filled):
        if needed == 1:
            if taken + tokens <= chunk:
                return block * chunk + taken
        elif block % blocks + needed <= blocks and not any(filled[block : block + needed]):
            return block * chunk
    return None


def reserve(filled: list[int], start: int, tokens: int, chunk: int) -> None:
    """Reserve a number of tokens from `start` on."""
    while tokens > 0:
        block, taken = divmod(start, chunk)
        part = min(tokens, chunk - taken)
        filled[block] += part
        start, tokens = start + part, tokens - part


@functools.cache
def _open_encoder(folder: Path) -> ExampleEncoder:
    return ExampleEncoder.from_folder(folder)
