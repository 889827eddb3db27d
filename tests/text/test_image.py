"""Laws of images: tiles equal the reference's, bad sources are refused with a message.

`golden/image_tiling.json` holds 71 rows `[height, width, rows, cols]`, read off
`Llama4ImageProcessor` of transformers 5.23. `golden/image_tiles.json` holds, for each name in
IMAGES, `summarize` of what the same processor returned for `make_image`, with torchvision
0.28.0 on x86 with AVX-512:

    out = Llama4ImageProcessor()(make_image(name), return_tensors="pt")
    rows, cols = out["aspect_ratios"][0].tolist()
    summarize(out["pixel_values"].float().numpy(), rows, cols)

The pixels are compared exactly: both sides round to the same 256 bfloat16 values, and the resize
reproduces torch's integer arithmetic.
"""

import base64
import hashlib
import io
import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from l4jax.testing import write_processor_configs
from l4jax.text.image import (
    ImageError,
    ImageProcessor,
    choose_canvas,
    count_tokens,
    fit_inside,
    format_image_tokens,
    open_image,
)
from l4jax.text.resample import make_levels, resize

GOLDEN = Path(__file__).parent.parent / "golden"

# name: height, width, mode
IMAGES = {
    "one tile": (336, 336, "RGB"),
    "small": (100, 70, "RGB"),
    "one pixel": (1, 1, "RGB"),
    "landscape": (500, 700, "RGB"),
    "one row too many": (337, 336, "RGB"),
    "very wide": (40, 3000, "RGB"),
    "very tall": (5000, 30, "RGB"),
    "transparent": (900, 1100, "RGBA"),
    "grey": (672, 672, "L"),
    "full canvas": (1500, 1400, "RGB"),
}


def make_image(name: str) -> Image.Image:
    """Gradients and hash noise in integers: the same image on every machine."""
    height, width, mode = IMAGES[name]
    y, x = np.mgrid[:height, :width].astype(np.uint32)
    noise = ((x * 2654435761 ^ y * 2246822519) * np.uint32(3266489917)) >> 24
    channels = [(x * 3 + y) % 256, (y * 2) % 256, noise, (x + y) % 256]
    bands = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.stack(channels[:bands], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


def summarize(pixels_ICHW: np.ndarray, rows: int, cols: int) -> dict:
    """Summarize tiles for a golden: the shape, a hash of every pixel, and a few pixels."""
    return {
        "shape": list(pixels_ICHW.shape),
        "grid": [rows, cols],
        "sum": float(pixels_ICHW.sum(dtype=np.float64)),
        "sample": [float(v) for v in pixels_ICHW[-1, :, 20::150, 33::140].ravel()],
        "sha256": hashlib.sha256(pixels_ICHW.astype("<f4").tobytes()).hexdigest(),
    }


# Tiles.


@pytest.mark.parametrize("name", IMAGES)
def test_tiles_equal_the_reference_bit_for_bit(name: str) -> None:
    golden = json.loads((GOLDEN / "image_tiles.json").read_text())[name]
    tiles = ImageProcessor()(make_image(name))
    assert tiles.pixels_ICHW.dtype == np.float32
    assert summarize(tiles.pixels_ICHW, tiles.rows, tiles.cols) == golden


def test_canvases_equal_the_reference() -> None:
    golden = json.loads((GOLDEN / "image_tiling.json").read_text())
    assert len(golden) == 71
    chosen = [[h, w, *choose_canvas(h, w)] for h, w, _, _ in golden]
    assert chosen == golden


@settings(deadline=None)
@given(height=st.integers(1, 20_000), width=st.integers(1, 20_000))
def test_an_image_fits_its_canvas_and_is_never_enlarged_beyond_a_tile(
    height: int, width: int
) -> None:
    rows, cols = choose_canvas(height, width)
    fit_height, fit_width = fit_inside(height, width, rows, cols)
    assert 1 <= rows * cols <= 16
    assert 1 <= fit_height <= min(rows * 336, max(height, 336))
    assert 1 <= fit_width <= min(cols * 336, max(width, 336))


def test_a_small_image_is_padded_with_black_and_a_large_one_ends_with_its_global_tile() -> None:
    white = Image.new("RGB", (336, 168), "white")
    tiles = ImageProcessor()(white)
    assert (tiles.rows, tiles.cols) == (1, 1)
    assert (tiles.pixels_ICHW[0, :, :168] == 1).all()
    assert (tiles.pixels_ICHW[0, :, 168:] == -1).all()
    tall = ImageProcessor()(white.resize((336, 600)))
    assert tall.pixels_ICHW.shape == (3, 3, 336, 336)
    assert (tall.pixels_ICHW[-1] == 1).all()


def test_tiles_are_in_reading_order() -> None:
    grey = np.repeat(np.repeat(np.array([[0, 50, 100], [150, 200, 250]], np.uint8), 336, 0), 336, 1)
    tiles = ImageProcessor()(Image.fromarray(grey))
    assert (tiles.rows, tiles.cols) == (2, 3)
    means = tiles.pixels_ICHW[:-1].mean(axis=(1, 2, 3))
    assert (np.diff(means) > 0).all()


def test_other_tiles_follow_the_vision_configuration() -> None:
    processor = ImageProcessor(tile=28, patch=7, max_tiles=4)
    tiles = processor(make_image("landscape"))
    assert tiles.pixels_ICHW.shape[1:] == (3, 28, 28)
    assert tiles.rows * tiles.cols <= 4
    assert processor.patches_per_tile == 4
    assert processor.format_tokens(tiles).count("<|patch|>") == len(tiles.pixels_ICHW) * 4


def test_a_resize_keeps_a_flat_image_and_stays_near_pillow() -> None:
    rng = random.Random(0)
    for _ in range(20):
        height, width, new_height, new_width = (rng.randint(1, 300) for _ in range(4))
        flat = np.full((height, width, 3), rng.randint(0, 255), np.uint8)
        assert (resize(flat, new_height, new_width) == flat[0, 0]).all()
        noise = np.frombuffer(rng.randbytes(height * width * 3), np.uint8)
        noise = noise.reshape(height, width, 3)
        pillow = Image.fromarray(noise).resize((new_width, new_height), Image.Resampling.BILINEAR)
        ours = resize(noise, new_height, new_width).astype(int)
        assert abs(ours - np.asarray(pillow)).max() <= 1


def test_levels_are_bfloat16_and_keep_black_and_white() -> None:
    levels = make_levels(1 / 255, (0.5,) * 3, (0.5,) * 3)
    assert levels.shape == (3, 256)
    assert (levels.view(np.uint32) & 0xFFFF == 0).all()
    assert levels[0, 0] == -1
    assert levels[0, 255] == 1
    # Level 1 is 1/255 = 0.00392 in bfloat16; minus 0.5 leaves 8 bits. In float32 it is -0.99216.
    assert levels[0, 1] == -0.9921875
    assert (np.diff(levels[0]) >= 0).all()


# Tokens.


@pytest.mark.parametrize(
    ("rows", "cols", "tokens"), [(1, 1, 147), (1, 2, 437), (2, 2, 727), (4, 4, 2467)]
)
def test_token_counts_are_the_known_ones(rows: int, cols: int, tokens: int) -> None:
    assert count_tokens(rows, cols) == tokens
    assert format_image_tokens(rows, cols).count("<|") == tokens


@pytest.mark.parametrize("patches", [1, 4, 144])
def test_count_tokens_counts_the_formatted_tokens(patches: int) -> None:
    for rows in range(1, 17):
        for cols in range(1, 16 // rows + 1):
            image_tokens = format_image_tokens(rows, cols, patches)
            assert image_tokens.count("<|") == count_tokens(rows, cols, patches_per_tile=patches)


def test_image_tokens_are_row_by_row_with_the_global_tile_last() -> None:
    p, x, y = "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"
    assert format_image_tokens(1, 1, 1) == f"<|image_start|><|image|>{p}<|image_end|>"
    row = f"{p}{p}{x}{p}{p}{x}{p}{p}{y}"
    assert format_image_tokens(2, 3, 2) == f"<|image_start|>{row}{row}<|image|>{p}{p}<|image_end|>"


# Configuration files.


def test_a_folder_without_files_gives_the_defaults_of_the_model(tmp_path: Path) -> None:
    processor = ImageProcessor.from_folder(tmp_path, image_size=28, patch_size=7)
    assert processor == ImageProcessor(tile=28, patch=7)


def test_the_published_files_are_read(tmp_path: Path) -> None:
    write_processor_configs(tmp_path, 336, 14)
    assert ImageProcessor.from_folder(tmp_path) == ImageProcessor()


def test_a_nested_image_processor_takes_precedence(tmp_path: Path) -> None:
    write_processor_configs(tmp_path, 336, 14)
    file = tmp_path / "processor_config.json"
    nested = json.loads((tmp_path / "preprocessor_config.json").read_text())
    outer = json.loads(file.read_text()) | {"image_processor": nested | {"max_patches": 4}}
    file.write_text(json.dumps(outer))
    assert ImageProcessor.from_folder(tmp_path).max_tiles == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resample", 3),
        ("do_resize", False),
        ("do_normalize", False),
        ("do_rescale", False),
        ("do_convert_rgb", False),
        ("do_center_crop", True),
        ("crop_size", {"height": 300, "width": 300}),
        ("resize_to_max_canvas", True),
        ("size", {"height": 336, "width": 448}),
        ("size", {"height": 224, "width": 224}),
        ("image_mean", [0.5, 0.5]),
        ("sharpen", 2),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_name(
    tmp_path: Path, key: str, value: object
) -> None:
    write_processor_configs(tmp_path, 336, 14)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ImageError, match=rf"preprocessor_config\.json: {key} = "):
        ImageProcessor.from_folder(tmp_path)


def test_files_that_disagree_with_the_model_are_refused(tmp_path: Path) -> None:
    write_processor_configs(tmp_path, 336, 14)
    with pytest.raises(ImageError, match="patch_size = 14 is not implemented; only 28"):
        ImageProcessor.from_folder(tmp_path, patch_size=28)
    (tmp_path / "processor_config.json").write_text("[1]")
    with pytest.raises(ImageError, match="not a JSON object"):
        ImageProcessor.from_folder(tmp_path)


# Sources.


def write_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_every_source_opens_as_the_same_image(tmp_path: Path) -> None:
    image = make_image("small")
    data = write_bytes(image)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (image, data, bytearray(data), path, str(path), uri):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert (np.asarray(opened) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://example.com/cat.png", "not fetched from the network"),
        ("HTTP://example.com/cat.png", "not fetched from the network"),
        ("no/such/picture.png", "'no/such/picture.png' cannot be read"),
        ("null\0byte.png", "cannot be read"),
        (".", "cannot be read"),
        ("data:image/png,rawbytes", "not a base64 data: URI"),
        ("data:image/png;base64", "not a base64 data: URI"),
        ("data:image/png;base64,@@@@", "base64 of the data: URI is broken"),
        ("data:image/png;base64,QQ", "base64 of the data: URI is broken"),
        ("data:image/png;base64,é", "base64 of the data: URI is broken"),
        ("data:image/png;base64,", "not an image in a known format"),
        (b"", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (b"<svg></svg>", "not an image in a known format"),
        (Image.new("RGB", (0, 5)), "empty: 0 x 5"),
        (Image.new("F", (2, 2)), "mode 'F'"),
        (7, "cannot be made of a int"),
    ],
)
def test_a_bad_source_is_refused_with_a_message(source: object, words: str) -> None:
    with pytest.raises(ImageError) as error:
        open_image(source)  # type: ignore[arg-type]
    assert words in str(error.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused_with_a_message(format: str) -> None:
    data = write_bytes(make_image("landscape"), format)
    open_image(data)
    with pytest.raises(ImageError, match=r"truncated or damaged|not an image"):
        open_image(data[: len(data) // 2])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_damaged_file_opens_or_is_refused_with_a_message(format: str) -> None:
    rng = random.Random(format)
    data = write_bytes(make_image("small"), format)
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            broken[rng.randrange(min(len(broken), 400))] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow also warns of odd metadata
            try:
                assert open_image(bytes(broken), max_pixels=10_000_000).mode == "RGB"
            except ImageError as error:
                assert str(error)


def test_a_large_image_is_refused_before_it_is_decoded() -> None:
    image = Image.new("1", (3000, 3000))
    with pytest.raises(ImageError, match="3000 x 3000 pixels, more than the 1000000 allowed"):
        open_image(write_bytes(image), max_pixels=1_000_000)
    # Only a header: decoding would fail, and would need 40 GB.
    header = b"P6 200000 200000 255\n"
    with pytest.raises(ImageError, match="too large to decode"):
        open_image(header)


def test_the_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert open_image(write_bytes(image, "JPEG", exif=exif)).size == (20, 40)


def test_transparent_pixels_are_blended_onto_white() -> None:
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    for source in (clear, write_bytes(clear), clear.convert("LA")):
        opened = open_image(source)
        assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert open_image(clear).getpixel((1, 0)) == (10, 20, 30)
    palette = clear.convert("RGB").quantize(2)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert open_image(palette).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_keep_their_levels_in_rgb() -> None:
    grey16 = Image.fromarray(np.array([[0, 0x7FFF, 0xFFFF]], np.uint16))
    for source in (grey16, write_bytes(grey16), write_bytes(grey16, "TIFF")):
        levels = [open_image(source).getpixel((x, 0)) for x in range(3)]
        assert levels == [(0, 0, 0), (127, 127, 127), (255, 255, 255)]
    assert open_image(Image.new("CMYK", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = write_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)
