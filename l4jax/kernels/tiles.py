"""How a product of blocks is cut: what was measured to be best, by the format of the weights."""

import functools
from typing import Any

import jax.numpy as jnp

from l4jax.kernels.blocks import GROUP, SCALES, Tiles, count_bits

FORMATS = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4)  # of weights

_SHARED_BYTES = 227 * 1024  # of a multiprocessor
_SPARE_BYTES = 2 * 1024  # of it, for barriers and what the compiler takes
MOST_STAGES = 12
_REGISTER_SLOTS = 32  # of a block, up to which four warpgroups have enough registers
_HELD_BYTES = 48 * 1024  # of tokens that are held; those of a thread while it rounds are registers
_PROMPT_SLOTS = 1024  # in all blocks, from which on arithmetic bounds and not memory

# By bits of a weight: rows, columns of a copy, blocks side by side, warpgroups that multiply.
# Widening int4 keeps four of them busy in a decode step.
_DECODE = {16: (128, 64, 4, 2), 8: (128, 128, 4, 2), 4: (256, 512, 4, 4)}
_PROMPT = {16: (256, 64, 8, 2), 8: (256, 128, 8, 2), 4: (128, 256, 8, 2)}
_LEAST_COLUMNS = {16: 64, 8: 128, 4: GROUP}


@functools.cache
def choose_tiles(
    dtype: Any,
    slots: int,
    rows: int,
    columns: int,
    *,
    blocks: int,
    live: float,
    sms: int,
    is_held: bool = False,
) -> Tiles | None:
    """How to cut a product; None where the kernel cannot run it.

    Args:
        dtype: of the weights.
        slots: of a block.
        rows, columns: of a matrix.
        blocks: there is room for.
        live: of these, multiplied, as far as one can tell beforehand.
        sms: multiprocessors.
        is_held: whether the tokens may be held, where all of them stand in each block.
    """
    if dtype not in FORMATS:
        return None
    bits = count_bits(dtype)
    is_prompt = blocks * slots >= _PROMPT_SLOTS
    height, depth, width, multipliers = (_PROMPT if is_prompt else _DECODE)[bits]
    if rows % height or (slots > _REGISTER_SLOTS and multipliers > 2):
        height, multipliers = (128, 2) if rows % 128 == 0 else (64, 1)
    if columns % depth:
        depth = _LEAST_COLUMNS[bits]
    if rows % height or columns % depth or slots % 8:
        return None
    held = slots * columns * bits // 8  # bytes
    is_held = is_held and held <= _HELD_BYTES and columns % (depth * multipliers) == 0
    token = 0 if is_held else slots * (16 if bits == 4 else bits)
    column = (height * bits + token) // 8  # bytes, of both operands
    scales = height * SCALES * 4 if bits == 4 else 0  # bytes of a copy
    out = multipliers * slots * 64 * (2 if is_prompt else 4)
    room = _SHARED_BYTES - _SPARE_BYTES - out - (held if is_held else 0)
    if room < 2 * (depth * column + scales):
        depth = min(depth, _LEAST_COLUMNS[bits])
    stages = min(MOST_STAGES, room // (depth * column + scales))
    # A part is written and read again in float32; what it was made of is read once.
    part = 8 * slots / (columns * bits / 8)
    splits = (
        1 if is_prompt else _choose_splits(live * (rows // height) / sms, columns // depth, part)
    )
    return Tiles(height, depth, stages, splits, width, multipliers, is_held)


def _choose_splits(rounds: float, steps: int, part: float) -> int:
    """Into how many parts to cut the columns, so that all multiprocessors have as much to do.

    Args:
        rounds: items of work of one multiprocessor, without a cut.
        steps: copies of an item.
        part: what it costs to write a part of an item, as a share of reading the item.
    """

    def waste(splits: int) -> float:
        whole = -(-rounds * splits // 1)
        return whole / (rounds * splits) * (1 + (part + 0.2 / steps) * splits)

    return min((s for s in range(1, steps + 1) if steps % s == 0), key=waste)


def choose_slots(tokens: int, experts: int) -> int:
    """Slots of a block for tokens that are spread over experts.

    Of few experts a block holds about twice the tokens that they have on average. More of them on
    one expert are several blocks, side by side, and the weights are read once more from L2.
    """
    if experts == 1:
        return min(128, -(-tokens // 8) * 8)
    return next((n for n in (8, 16, 32, 64) if tokens <= n * experts // 2), 128)
