"""Resize images and normalize pixels with the same rounding as the reference.

Transformers passes uint8 tensors to torch, which resamples them with 16-bit integer weights. Pillow
uses 22-bit weights; the two differ by one level in up to a fifth of the values. This module
reproduces torch's integers, so the pixels agree bit for bit. (Torch takes that path on any x86
machine with AVX2; elsewhere its own result may differ by one level.)
"""

import numpy as np

# Output columns or rows per matrix product. Wider blocks multiply by more zeros, narrower blocks
# cost more calls. With 8, a 12-megapixel photograph takes about 0.1 s on two cores.
BLOCK = 8


def resize(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 image `[H, W, C]` to `[height, width, C]`: bilinear, antialiased.

    Columns first, rounded to uint8, then rows: the order of torch and of Pillow.
    """
    shrunk_HWC = resample_columns(pixels_HWC, width)
    # Rows are the columns of the transposed image.
    return resample_columns(shrunk_HWC.swapaxes(0, 1), height).swapaxes(0, 1)


def resample_columns(pixels_HWC: np.ndarray, width: int) -> np.ndarray:
    """Resample axis 1 of a uint8 array `[H, W, C]` to `width` columns.

    Floating-point matrix products compute the sums, and they are exact: every partial sum is an
    integer that the chosen type can hold (float32 up to about 4x shrinkage).
    """
    source_width = pixels_HWC.shape[1]
    if source_width == width:
        return pixels_HWC
    first, weights, bits = make_weights(source_width, width)
    taps = weights.shape[1]
    largest_sum = 255 * int(weights.sum(axis=1).max())
    exact = np.float32 if largest_sum < 1 << 24 else np.float64
    out_HWC = np.empty((pixels_HWC.shape[0], width, pixels_HWC.shape[2]), np.uint8)
    for start in range(0, width, BLOCK):
        columns = np.arange(start, min(start + BLOCK, width))
        low = first[start]
        high = min(first[columns[-1]] + taps, source_width)
        # Taps past the right edge have weight zero; their index is clamped to the last column.
        band = np.zeros((columns.size, high - low), exact)
        index = np.minimum(first[columns, None] + np.arange(taps) - low, high - low - 1)
        np.add.at(band, (np.arange(columns.size)[:, None], index), weights[columns])
        strip_HCW = pixels_HWC[:, low:high].swapaxes(1, 2).astype(exact)
        sums_HCW = (strip_HCW @ band.T).astype(np.int32)
        levels_HCW = np.minimum((sums_HCW + (1 << (bits - 1))) >> bits, 255)
        out_HWC[:, columns] = levels_HCW.swapaxes(1, 2)
    return out_HWC


def make_weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Compute triangle-filter weights that resample `source` samples to `target` samples.

    Returns:
        `first [target]` first source index of each output; `weights [target, taps]` integers;
        `bits`: an output is `(sum + half) >> bits`.
    """
    scale = source / target
    reach = max(scale, 1.0)  # half width of the triangle; at least one sample when enlarging
    center = scale * (np.arange(target) + 0.5)
    first = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((center + reach + 0.5).astype(np.int64), source)
    tap = np.arange((last - first).max())
    distance = (tap + first[:, None] - center[:, None] + 0.5) * (1.0 / reach)
    weights = np.maximum(0.0, 1.0 - np.abs(distance)) * (tap < (last - first)[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    # The most fraction bits for which the largest weight fits a signed 16-bit integer.
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return first, (weights * (1 << bits) + 0.5).astype(np.int32), bits


def make_levels(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Compute the normalized value of every uint8 level: float32 `[channels, 256]`.

    The reference normalizes in bfloat16, rounding after each operation: `level * rescale`,
    `- mean`, `/ std`. A pixel has 256 levels, so that arithmetic fits in a table.
    """
    level_256 = np.arange(256, dtype=np.float32)
    scaled_256 = round_to_bfloat16(level_256 * np.float32(rescale))
    mean_C1 = round_to_bfloat16(np.array(mean, np.float32))[:, None]
    std_C1 = round_to_bfloat16(np.array(std, np.float32))[:, None]
    return round_to_bfloat16(round_to_bfloat16(scaled_256 - mean_C1) / std_C1)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 values to the nearest bfloat16, ties to even; the result is float32."""
    bits = values.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
