"""Opening images from untrusted files: raster formats only, with size checks before anything is decoded."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted image formats. EPS is left out because Pillow runs Ghostscript on it."""

MAX_PIXELS = 89_478_485
"""Default limit of pixels per image, the most that Pillow opens without a warning: 256 MiB in RGB."""

_pillow_limit = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be used.

    Args:
        kind: the kind of error in a few words, the same for all images with this error.
        sentence: the message for this image.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as upright RGB: the first frame of an animation, with transparency on white.

    Raises:
        ImageError: the file cannot be read, is not an image in one of :data:`FORMATS`, is damaged or truncated, or has
            more than ``max_pixels`` pixels.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise ImageError("unreadable file", f"Cannot read {path}: {_reason(error)}.") from error
    with file:
        return read_image(file, path, max_pixels)


def read_image(file: BinaryIO, name: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Like :func:`open_image`, for an open file, which error messages call ``name``."""
    with _allow(max_pixels):
        image = _identify(name, file, max_pixels)
        try:
            return _rgb(ImageOps.exif_transpose(image))
        # Decoders raise all kinds of errors on damaged files: SyntaxError, struct.error, EOFError, IndexError and more.
        except Exception as error:
            raise _damaged(name, error) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _damaged(name: str | Path, error: Exception) -> ImageError:
    return ImageError("damaged picture", f"{name} is damaged or cut short: {str(error).rstrip('.')}.")


def _identify(path: str | Path, file: BinaryIO, max_pixels: int) -> Image.Image:
    """The image with its header read, but no pixels decoded."""
    too_large = f"more than the limit of {max_pixels:,} pixels"
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels", f"{path} has {too_large}.") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ImageError("not a picture", f"{path} is not a picture of a known format ({known}).") from error
    except Exception as error:
        raise _damaged(path, error) from error
    if image.width * image.height > max_pixels:
        raise ImageError("too many pixels", f"{path} is {image.width} x {image.height}, {too_large}.")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to eight bits per channel, without transparency."""
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits to 8.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _allow(max_pixels: int) -> Iterator[None]:
    """Raise Pillow's global pixel limit to ``max_pixels`` and make it refuse truncated files, within the context."""
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        own, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS = None if own is None else max(own, max_pixels)
        # Other libraries switch it on for the entire process.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = own
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated
