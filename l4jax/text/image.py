"""The image processor: canvases, tiles, and the tokens that stand for an image in the prompt.

Source of the steps: Llama4ImageProcessor and Llama4Processor of transformers 5.23. The goldens in
the tests were recorded from them, and the pixels agree bit for bit. `image_io` opens images,
`resample` resizes and normalizes pixels.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from l4jax.json_file import quote, read_object_if_present
from l4jax.text.image_io import ImageError, convert_to_rgb, open_image
from l4jax.text.resample import make_levels, resize

__all__ = [
    "ImageError",
    "ImageProcessor",
    "Tiles",
    "choose_canvas",
    "count_tokens",
    "fit_inside",
    "format_image_tokens",
    "open_image",
]

IMAGE_PLACEHOLDER = "<|image|>"
PATCH = "<|patch|>"
MAX_TILES = 1024  # 64 times the published models'; the list of canvases grows with it
IMAGE_START = "<|image_start|>"
IMAGE_END = "<|image_end|>"
TILE_X = "<|tile_x_separator|>"
TILE_Y = "<|tile_y_separator|>"
IMAGE_TOKENS = (IMAGE_PLACEHOLDER, PATCH, IMAGE_START, IMAGE_END, TILE_X, TILE_Y)


@dataclass(frozen=True, eq=False)  # array equality is elementwise
class Tiles:
    """One image, ready for the vision encoder.

    `pixels_ICHW` is float32 `[tiles, 3, tile, tile]`: `rows * cols` tiles in reading order. If
    there is more than one, the global tile follows, which shows the whole image.
    """

    pixels_ICHW: np.ndarray
    rows: int
    cols: int

    @cached_property
    def hashes(self) -> list[bytes]:
        """A digest of each tile's pixels; tiles with equal pixels have equal hashes."""
        return [
            hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
            for pixels in np.ascontiguousarray(self.pixels_ICHW)
        ]


@lru_cache
def list_canvases(max_tiles: int) -> np.ndarray:
    """List every `(rows, cols)` of at most `max_tiles` tiles as int64 `[N, 2]`, by area."""
    pairs = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    return np.array(sorted(pairs, key=lambda pair: pair[0] * pair[1]))


def choose_canvas(
    height: int, width: int, *, tile: int = 336, max_tiles: int = 16
) -> tuple[int, int]:
    """Choose the canvas, `(rows, cols)` of tiles, for an image of this size in pixels.

    The canvas with the least enlargement wins, else the one with the least reduction; the smallest
    area breaks ties. Scales are float32, as in the reference: in float64 other sizes would tie.
    """
    canvases_N2 = list_canvases(max_tiles)
    side_2 = np.array([height, width], np.float32)
    scale_N = ((canvases_N2 * tile).astype(np.float32) / side_2).min(axis=1)
    fitting_N = scale_N[scale_N >= 1]
    chosen = fitting_N.min() if fitting_N.size else scale_N.max()
    rows, cols = canvases_N2[np.argmax(scale_N == chosen)]  # the first has the smallest area
    return int(rows), int(cols)


def fit_inside(
    height: int, width: int, rows: int, cols: int, *, tile: int = 336
) -> tuple[int, int]:
    """Compute the size, `(height, width)` in pixels, of an image on its canvas.

    The aspect ratio is kept, and no side grows beyond one tile. The reference computes a ratio in
    float32 where the canvas bounds that side, else in float64, and floors the result. The precision
    can decide a pixel, so it is the same here.
    """
    room_height, room_width = max(height, tile), max(width, tile)
    is_cut_height, is_cut_width = rows * tile < room_height, cols * tile < room_width
    target_height = min(room_height, rows * tile)
    target_width = min(room_width, cols * tile)

    def divide(target: int, side: int, is_cut: bool) -> np.floating:
        kind = np.float32 if is_cut else np.float64
        return kind(target) / kind(side)

    scale_height = divide(target_height, height, is_cut_height)
    scale_width = divide(target_width, width, is_cut_width)
    kind = np.float32 if is_cut_height or is_cut_width else np.float64
    if kind(scale_width) < kind(scale_height):
        side = scale_width.dtype.type(height) * scale_width
        return max(1, min(int(side), target_height)), target_width
    side = scale_height.dtype.type(width) * scale_height
    return target_height, max(1, min(int(side), target_width))


def count_tokens(rows: int, cols: int, *, patches_per_tile: int = 144) -> int:
    """Count the prompt tokens of an image of `rows x cols` tiles."""
    tiles = rows * cols
    grid = 0 if tiles == 1 else tiles * patches_per_tile + rows * (cols - 1) + rows
    return grid + patches_per_tile + 3  # image_start, image, image_end


def format_image_tokens(rows: int, cols: int, patches_per_tile: int = 144) -> str:
    """Format the token string of an image of `rows x cols` tiles.

    X separators join the tiles of a row, and a y separator ends the row. The global tile comes
    last, after `<|image|>`. A single tile is its own global tile.
    """
    tile = PATCH * patches_per_tile
    grid = "" if rows * cols == 1 else (TILE_X.join([tile] * cols) + TILE_Y) * rows
    return IMAGE_START + grid + IMAGE_PLACEHOLDER + tile + IMAGE_END


@dataclass(frozen=True)
class ImageProcessor:
    """Splits an image into normalized tiles. `tile` and `patch` are side lengths in pixels."""

    tile: int = 336
    patch: int = 14
    pixel_shuffle: float = 0.5
    max_tiles: int = 16
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike,
        *,
        image_size: int = 336,
        patch_size: int = 14,
        pixel_shuffle: float = 0.5,
    ) -> "ImageProcessor":
        """Read `preprocessor_config.json` and `processor_config.json`, where they exist.

        Args:
            folder: a checkpoint's folder.
            image_size, patch_size, pixel_shuffle: the model's vision configuration. The files must
                agree with it: the model cannot take other tiles.

        Raises:
            ImageError: a file has a value that is not implemented here.
        """
        outer = read_object_if_present(Path(folder) / "processor_config.json", ImageError)
        # transformers 5 nests the image processor in processor_config.json, which takes precedence.
        nested = outer.pop("image_processor", None)
        name = "processor_config.json"
        check_values(name, outer, {"patch_size": patch_size, "pixel_shuffle_ratio": pixel_shuffle})
        if nested is None:
            name = "preprocessor_config.json"
            nested = read_object_if_present(Path(folder) / name, ImageError)
        if not isinstance(nested, dict):
            raise ImageError(f"{name}: image_processor is {quote(nested)}, not an object.")
        size = {"height": image_size, "width": image_size}
        check_values(name, nested, {"size": size})
        default = cls(tile=image_size, patch=patch_size, pixel_shuffle=pixel_shuffle)

        def get(key: str, fallback: Any) -> Any:
            value = nested.get(key)
            return fallback if value is None else value

        return cls(
            tile=image_size,
            patch=patch_size,
            pixel_shuffle=pixel_shuffle,
            max_tiles=read_max_tiles(name, get("max_patches", default.max_tiles)),
            rescale=read_positive(name, "rescale_factor", get("rescale_factor", default.rescale)),
            mean=read_channels(name, "image_mean", get("image_mean", default.mean)),
            std=read_channels(name, "image_std", get("image_std", default.std)),
        )

    @property
    def patches_per_tile(self) -> int:
        """Tokens per tile: 144 for 336 pixels, patches of 14 and a pixel shuffle of 0.5."""
        return (self.tile // self.patch) ** 2 // round(1 / self.pixel_shuffle**2)

    @cached_property
    def levels_C256(self) -> np.ndarray:
        """The normalized value of every uint8 level of each channel, float32 `[3, 256]`."""
        return make_levels(self.rescale, self.mean, self.std)

    def __call__(self, image: Image.Image) -> Tiles:
        """Split an image into tiles and normalize them."""
        tiles_ICHW, rows, cols = self.split(image)
        normal_ICHW = np.stack(
            [levels_256[tiles_ICHW[:, c]] for c, levels_256 in enumerate(self.levels_C256)], axis=1
        )
        return Tiles(normal_ICHW, rows, cols)

    def split(self, image: Image.Image) -> tuple[np.ndarray, int, int]:
        """Resize an image onto its canvas and split the canvas into tiles.

        Returns:
            The tiles as uint8 `[tiles, 3, tile, tile]`, and the canvas's rows and columns of tiles.
            The padding at the right and the bottom is black.
        """
        pixels_HWC = np.asarray(convert_to_rgb(image))
        height, width = pixels_HWC.shape[:2]
        rows, cols = choose_canvas(height, width, tile=self.tile, max_tiles=self.max_tiles)
        fit_height, fit_width = fit_inside(height, width, rows, cols, tile=self.tile)
        canvas_HWC = np.zeros((rows * self.tile, cols * self.tile, 3), np.uint8)
        canvas_HWC[:fit_height, :fit_width] = resize(pixels_HWC, fit_height, fit_width)
        grid = canvas_HWC.reshape(rows, self.tile, cols, self.tile, 3).transpose(0, 2, 4, 1, 3)
        tiles_ICHW = grid.reshape(rows * cols, 3, self.tile, self.tile)
        if rows * cols > 1:
            # The global tile is the whole image stretched to a square, whatever its aspect ratio.
            global_CHW = resize(pixels_HWC, self.tile, self.tile).transpose(2, 0, 1)
            tiles_ICHW = np.concatenate([tiles_ICHW, global_CHW[None]])
        return tiles_ICHW, rows, cols

    def format_tokens(self, tiles: Tiles) -> str:
        """Format the token string of this image."""
        return format_image_tokens(tiles.rows, tiles.cols, self.patches_per_tile)


# The one implemented value of each key; the arguments of check_values add to these.
IMPLEMENTED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 2,  # bilinear
    "resize_to_max_canvas": False,
    "do_center_crop": False,
    "do_pad": False,
    "crop_size": None,
    "pad_size": None,
    "default_to_square": True,
    "data_format": "channels_first",
    "fake_image_token": IMAGE_PLACEHOLDER,
    "image_token": IMAGE_PLACEHOLDER,
    "patch_token": PATCH,
    "start_of_image_token": IMAGE_START,
    "end_of_image_token": IMAGE_END,
    "tile_x_separator_token": TILE_X,
    "tile_y_separator_token": TILE_Y,
}
# Keys that may have any value: from_folder reads them, or they do not affect the pixels.
UNCHECKED = {
    "max_patches",
    "rescale_factor",
    "image_mean",
    "image_std",
    "image_processor_type",
    "processor_class",
    "device",
    "return_tensors",
    "input_data_format",
    "disable_grouping",
    "chat_template",
    "auto_map",
}


def check_values(name: str, values: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ImageError for a value that is not implemented. `null` means the default."""
    wanted = IMPLEMENTED | wanted
    for key, value in values.items():
        if value is None or key in UNCHECKED or key.startswith("_"):
            continue
        if key not in wanted:
            raise ImageError(
                f"{name}: {quote(key)[1:-1]} = {quote(value)} is not known here; "
                "remove it if it changes no pixel."
            )
        if value != wanted[key]:
            raise ImageError(
                f"{name}: {key} = {quote(value)} is not implemented; only {wanted[key]!r} is."
            )


def read_max_tiles(name: str, value: Any) -> int:
    """Read the limit of tiles."""
    if type(value) is not int or not 1 <= value <= MAX_TILES:
        raise ImageError(
            f"{name}: max_patches = {quote(value)} must be a whole number from 1 to {MAX_TILES}."
        )
    return value


def read_positive(name: str, key: str, value: Any) -> float:
    """Read a positive number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 1e-30 < value < 1e30:  # float32 has these
        raise ImageError(f"{name}: {key} = {quote(value)} must be a positive number.")
    return float(value)


def read_channels(name: str, key: str, value: Any) -> tuple[float, ...]:
    """Read one number from 0 to 1 per channel; a single number holds for all three."""
    channels = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(channels) != 3 or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in channels):
        raise ImageError(
            f"{name}: {key} = {quote(value)} must be one number from 0 to 1 for each of 3 channels."
        )
    if key == "image_std":
        return tuple(read_positive(name, key, x) for x in channels)
    return tuple(float(x) for x in channels)
