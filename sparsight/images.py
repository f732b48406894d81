"""Opening pictures from untrusted files: raster formats only, size checked before anything is decoded."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that a picture may have. Never EPS, which hands the file to Ghostscript."""

MAX_PIXELS = 89_478_485
"""Pixels that a picture may have unless told otherwise, as many as Pillow opens without a warning: 256 MiB in RGB."""

_pillow_limit = threading.Lock()


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as upright RGB; of an animation the first frame, and what is transparent on white.

    Raises:
        ValueError: the file cannot be read, is no picture in one of :data:`FORMATS`, is damaged or cut short, or has
            more than ``max_pixels`` pixels.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    with file, _allow(max_pixels):
        image = _identify(path, file, max_pixels)
        try:
            return _rgb(ImageOps.exif_transpose(image))
        # Decoders raise all kinds of errors on damaged files: SyntaxError, struct.error, EOFError, IndexError and more.
        except Exception as error:
            raise ValueError(f"{path} is damaged or cut short: {str(error).rstrip('.')}.") from error


def _identify(path: str | Path, file: BinaryIO, max_pixels: int) -> Image.Image:
    """The picture with its header read, but no pixel decoded."""
    too_large = f"more than the limit of {max_pixels:,} pixels"
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has {too_large}.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture of a known format ({', '.join(FORMATS)}).") from error
    except Exception as error:
        raise ValueError(f"{path} is damaged or cut short: {str(error).rstrip('.')}.") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"{path} is {image.width} x {image.height}, {too_large}.")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, without transparency."""
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits to 8.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _allow(max_pixels: int) -> Iterator[None]:
    """Lift Pillow's own limit, which is global, to ``max_pixels`` meanwhile, and let it refuse what is cut short."""
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        own, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS = None if own is None else max(own, max_pixels)
        # Other libraries switch it on for the whole process.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = own
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated
