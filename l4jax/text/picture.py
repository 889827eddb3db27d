"""Open pictures from wherever they come: a path, a data: URI, bytes, or Pillow."""

import base64
import binascii
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow's own threshold: above it a small file may be meant to fill the memory.
MAX_PIXELS = 89_478_485

# Plain raster formats. Others are left out on purpose: Pillow runs Ghostscript to open EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# What Pillow raises on broken files, depending on the format and on where the damage is.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)

ImageSource = str | os.PathLike | bytes | bytearray | Image.Image


class ImageError(ValueError):
    """A picture that cannot be read, or a processor configuration that is not implemented."""


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture as upright RGB.

    The EXIF orientation is applied, as transformers' `load_image` does; transparent pixels are
    laid on white, as its image processors do; 16-bit grey keeps its high byte; of an animation the
    first frame is taken.

    Args:
        source: a path, a base64 `data:` URI, the bytes of a file, or a Pillow image.
        max_pixels: a larger picture is refused by its header, before it is decoded.

    Raises:
        ImageError: the source cannot be read, is too large, or is not a picture.
    """
    if isinstance(source, Image.Image):
        return decode_image(source, "the image", max_pixels)
    if isinstance(source, bytes | bytearray):
        data, name = bytes(source), f"the image ({len(source)} bytes)"
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data, name = decode_data_uri(source), "the image in the data: URI"
    elif isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        raise ImageError(
            f"{source[:80]!r}: images are not fetched from the network; download it and pass the "
            "path, the bytes, or a data: URI."
        )
    elif isinstance(source, str | os.PathLike):
        data, name = read_file(source), f"{os.fspath(source)!r}"
    else:
        raise ImageError(
            f"An image cannot be made of a {type(source).__name__}: pass a path, a data: URI, "
            "bytes, or a Pillow image."
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large to decode: {error}") from error
    except DECODE_ERRORS as error:
        raise ImageError(
            f"{name} is not a picture in a known format; use one of {', '.join(FORMATS)}."
        ) from error
    return decode_image(image, name, max_pixels)


def read_file(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(
            f"{os.fspath(path)!r} cannot be read as an image file: {reason}."
        ) from error


def decode_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ImageError(
            f"{uri[:40]!r} is not a base64 data: URI; write data:image/png;base64,<the file>."
        )
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"The base64 of the data: URI is broken: {error}.") from error


def decode_image(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty: {width} x {height} pixels; give one with pixels.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than the {max_pixels} allowed; shrink it."
        )
    try:
        image.load()
        return convert_to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(f"{name} is truncated or damaged: {error}") from error


def convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow would clip every value above 255 to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"A picture of mode {image.mode!r} has no known range of brightness; "
            "convert it to 8 bits first."
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
