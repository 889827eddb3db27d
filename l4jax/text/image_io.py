"""Open images as upright RGB: from a path, a data: URI, bytes, or a Pillow image."""

import base64
import binascii
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow's own threshold: a small file of more pixels may be a decompression bomb.
MAX_PIXELS = 89_478_485

# Plain raster formats. Pillow opens more, but runs Ghostscript for EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Pillow raises these on broken files, depending on the format and the damaged part.
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
    """An image that cannot be read, or a processor configuration that is not implemented."""


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image as upright RGB.

    The EXIF orientation is applied, as transformers' `load_image` does. Transparent pixels are
    blended onto white, as its image processors do. 16-bit gray keeps its high byte; an animation
    gives its first frame.

    Args:
        source: a path, a base64 `data:` URI, the bytes of a file, or a Pillow image.
        max_pixels: the limit; the header is checked before anything is decoded.

    Raises:
        ImageError: the source cannot be read, is too large, or is not an image.
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
            f"{name} is not an image in a known format; use one of {', '.join(FORMATS)}."
        ) from error
    return decode_image(image, name, max_pixels)


def read_file(path: str | os.PathLike) -> bytes:
    """Read an image file."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(
            f"{os.fspath(path)!r} cannot be read as an image file: {reason}."
        ) from error


def decode_data_uri(uri: str) -> bytes:
    """Decode the bytes of a base64 `data:` URI."""
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
    """Check the size of an opened image, decode it, and convert it to upright RGB."""
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
    """Convert an image of any mode to 8-bit RGB, transparent pixels onto white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow would clip every value above 255 to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"An image of mode {image.mode!r} has no known range of brightness; "
            "convert it to 8 bits first."
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
