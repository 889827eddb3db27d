"""Pictures to tiles, and the tokens that stand for them.

Source of the steps: Llama4ImageProcessor and Llama4Processor of transformers 5.23; the goldens in
the tests were recorded from them, and the pixels agree bit for bit.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from l4jax.text.picture import ImageError, convert_to_rgb, open_image
from l4jax.text.resample import make_levels, resize

__all__ = [
    "ImageError",
    "ImageProcessor",
    "Tiles",
    "choose_canvas",
    "count_tokens",
    "fit_inside",
    "open_image",
    "spell_image",
]

IMAGE_MARK = "<|image|>"
PATCH = "<|patch|>"
IMAGE_START = "<|image_start|>"
IMAGE_END = "<|image_end|>"
TILE_X = "<|tile_x_separator|>"
TILE_Y = "<|tile_y_separator|>"
IMAGE_TOKENS = (IMAGE_MARK, PATCH, IMAGE_START, IMAGE_END, TILE_X, TILE_Y)


@dataclass(frozen=True, eq=False)  # arrays have no yes-or-no equality
class Tiles:
    """One picture, ready for the vision encoder.

    `pixels_ICHW` is float32 `[tiles, 3, tile, tile]`: `rows * cols` tiles in reading order, then,
    if there is more than one, a tile that shows the whole picture.
    """

    pixels_ICHW: np.ndarray
    rows: int
    cols: int

    @cached_property
    def names(self) -> list[bytes]:
        """A digest of each tile's pixels: what is encoded alike has the same."""
        return [
            hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
            for pixels in np.ascontiguousarray(self.pixels_ICHW)
        ]


@lru_cache
def list_canvases(max_tiles: int) -> np.ndarray:
    """Every `(rows, cols)` of at most `max_tiles` tiles, smallest area first: int64 `[N, 2]`."""
    pairs = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    return np.array(sorted(pairs, key=lambda pair: pair[0] * pair[1]))


def choose_canvas(
    height: int, width: int, *, tile: int = 336, max_tiles: int = 16
) -> tuple[int, int]:
    """The grid of tiles, `(rows, cols)`, that a picture of this size (pixels) is laid on.

    The canvas that needs the least enlargement, or failing that the least reduction; of equals the
    smallest. Scales are float32, as in the reference: in float64 other sizes would tie.
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
    """The size, `(height, width)` in pixels, of a picture once it lies on its canvas.

    The aspect ratio is kept, and no side grows beyond one tile. The reference computes a ratio in
    float32 where the canvas bounds that side and in float64 elsewhere, and floors the result, so
    the precision can decide a pixel; it is followed here.
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
    """How many tokens a picture of `rows x cols` tiles takes in the prompt."""
    tiles = rows * cols
    grid = 0 if tiles == 1 else tiles * patches_per_tile + rows * (cols - 1) + rows
    return grid + patches_per_tile + 3  # image_start, image, image_end


def spell_image(rows: int, cols: int, patches_per_tile: int = 144) -> str:
    """The token string of a picture of `rows x cols` tiles.

    Each row of tiles is joined by x separators and closed by a y separator; the global tile comes
    last, after `<|image|>`. A single tile is its own global tile.
    """
    tile = PATCH * patches_per_tile
    grid = "" if rows * cols == 1 else (TILE_X.join([tile] * cols) + TILE_Y) * rows
    return IMAGE_START + grid + IMAGE_MARK + tile + IMAGE_END


@dataclass(frozen=True)
class ImageProcessor:
    """Cuts a picture into normalized tiles. Sides in pixels; `patch` is the side of a patch."""

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
                agree with it, since the model cannot take other tiles.

        Raises:
            ImageError: a file asks for something that is not implemented here.
        """
        outer = read_json(Path(folder) / "processor_config.json")
        # transformers 5 nests the image processor in the processor's file, and prefers it there.
        nested = outer.pop("image_processor", None)
        name = "processor_config.json"
        check_values(name, outer, {"patch_size": patch_size, "pixel_shuffle_ratio": pixel_shuffle})
        if nested is None:
            name = "preprocessor_config.json"
            nested = read_json(Path(folder) / name)
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
            max_tiles=int(get("max_patches", default.max_tiles)),
            rescale=float(get("rescale_factor", default.rescale)),
            mean=read_channels(name, "image_mean", get("image_mean", default.mean)),
            std=read_channels(name, "image_std", get("image_std", default.std)),
        )

    @property
    def patches_per_tile(self) -> int:
        """Tokens a tile becomes: 144 for 336 pixels, patches of 14 and a pixel shuffle of 0.5."""
        return (self.tile // self.patch) ** 2 // round(1 / self.pixel_shuffle**2)

    @cached_property
    def levels_C256(self) -> np.ndarray:
        return make_levels(self.rescale, self.mean, self.std)

    def __call__(self, image: Image.Image) -> Tiles:
        """Lay the picture on its canvas, cut it and normalize the tiles."""
        tiles_ICHW, rows, cols = self.cut(image)
        normal_ICHW = np.stack(
            [levels_256[tiles_ICHW[:, c]] for c, levels_256 in enumerate(self.levels_C256)], axis=1
        )
        return Tiles(normal_ICHW, rows, cols)

    def cut(self, image: Image.Image) -> tuple[np.ndarray, int, int]:
        """The tiles of a picture as uint8 `[tiles, 3, tile, tile]`, and the canvas's rows and
        columns of them.

        Padding, right and bottom, is black.
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
            # The global tile is the whole picture stretched to a square, aspect ratio or not.
            whole_CHW = resize(pixels_HWC, self.tile, self.tile).transpose(2, 0, 1)
            tiles_ICHW = np.concatenate([tiles_ICHW, whole_CHW[None]])
        return tiles_ICHW, rows, cols

    def spell(self, tiles: Tiles) -> str:
        """The token string of this picture."""
        return spell_image(tiles.rows, tiles.cols, self.patches_per_tile)


# The one value that is implemented for each key; the arguments of check_values add to these.
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
    "fake_image_token": IMAGE_MARK,
    "image_token": IMAGE_MARK,
    "patch_token": PATCH,
    "start_of_image_token": IMAGE_START,
    "end_of_image_token": IMAGE_END,
    "tile_x_separator_token": TILE_X,
    "tile_y_separator_token": TILE_Y,
}
# Keys that from_folder reads, or that say nothing about the pixels.
FREE = {
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
        if value is None or key in FREE or key.startswith("_"):
            continue
        if key not in wanted:
            raise ImageError(
                f"{name}: {key} = {value!r} is not known here; remove it if it changes no pixel."
            )
        if value != wanted[key]:
            raise ImageError(
                f"{name}: {key} = {value!r} is not implemented; only {wanted[key]!r} is."
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ImageError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ImageError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def read_channels(name: str, key: str, value: Any) -> tuple[float, ...]:
    channels = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(channels) != 3 or not all(isinstance(x, int | float) for x in channels):
        raise ImageError(f"{name}: {key} = {value!r} must be one number for each of 3 channels.")
    return tuple(float(x) for x in channels)
