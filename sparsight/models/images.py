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


class PictureError(ValueError):
    """A picture that cannot be used.

    Args:
        kind: what is wrong, in a few words that are the same for all such pictures.
        sentence: what is wrong with this one.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as upright RGB; of an animation the first frame, and what is transparent on white.

    Raises:
        PictureError: the file cannot be read, is no picture in one of :data:`FORMATS`, is damaged or cut short, or has
            more than ``max_pixels`` pixels.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise PictureError("unreadable file", f"Cannot read {path}: {_reason(error)}.") from error
    with file:
        return read_image(file, path, max_pixels)


def read_image(file: BinaryIO, name: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """:func:`open_image` of an open file; errors call it ``name``."""
    with _allow(max_pixels):
        image = _identify(name, file, max_pixels)
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        # Decoders raise all kinds of errors on damaged files: SyntaxError, struct.error, EOFError, IndexError and more.
        except Exception as error:
            raise _damaged(name, error) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _damaged(name: str | Path, error: Exception) -> PictureError:
    return PictureError("damaged picture", f"{name} is damaged or cut short: {str(error).rstrip('.')}.")


def _identify(path: str | Path, file: BinaryIO, max_pixels: int) -> Image.Image:
    """The picture with its header read, but no pixel decoded."""
    too_large = f"more than the limit of {max_pixels:,} pixels"
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError("too many pixels", f"{path} has {too_large}.") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise PictureError("not a picture", f"{path} is not a picture of a known format ({known}).") from error
    except Exception as error:
        raise _damaged(path, error) from error
    if image.width * image.height > max_pixels:
        raise PictureError("too many pixels", f"{path} is {image.width} x {image.height}, {too_large}.")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
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
