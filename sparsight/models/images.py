"""Opening images from untrusted files: raster formats only, with size checks before anything is decoded."""

import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from sparsight.utils.text import first_sentence, printable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted image formats. EPS is left out because Pillow runs Ghostscript on it."""

MAX_PIXELS = 89_478_485
"""Default limit of pixels per image, the most that Pillow opens without a warning: 256 MiB in RGB."""

MAX_RATIO = 200
"""Largest ratio of an image's sides. A processor that scales the short side to a fixed length, such as 336 pixels,
would turn an image of 1 x 5,000 pixels into one of 336 x 1,680,000."""

_URL = re.compile(r"(https?|ftp|file):/|data:", re.IGNORECASE)

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
        ImageError: the path is a URL or not a regular file, the file cannot be read, is not an image in one of
            :data:`FORMATS`, is damaged or truncated, has more than ``max_pixels`` pixels, or has sides that differ by
            more than a factor of :data:`MAX_RATIO`.
    """
    name = printable(path)
    try:
        file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    except (OSError, ValueError) as error:
        if _URL.match(str(path)):
            sentence = f"{name} is a URL: images are given as paths of local files."
            raise ImageError("unreadable file", sentence) from error
        reason = getattr(error, "strerror", None) or first_sentence(error).rstrip(".")
        raise ImageError("unreadable file", f"Cannot read {name}: {reason}.") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ImageError("unreadable file", f"Cannot read {name}: Not a regular file.")
        return read_image(file, path, max_pixels)


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a FIFO does not wait for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_image(
    file: BinaryIO, name: str | Path, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Like :func:`open_image`, for an open file in one of ``formats``, which error messages call ``name``."""
    name = printable(name)
    with _allow(max_pixels):
        image = _identify(name, file, max_pixels, formats)
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        # Decoders raise all kinds of errors on damaged files: SyntaxError, struct.error, EOFError, IndexError and more.
        except Exception as error:
            raise _damaged(name, error) from error


def check_sides(image: Image.Image, name: str = "A picture") -> None:
    """Raise ImageError if the sides of an image differ by more than a factor of :data:`MAX_RATIO`."""
    if max(image.size) > MAX_RATIO * min(image.size):
        sentence = f"{name} is {image.width} x {image.height}: its sides may differ by a factor of {MAX_RATIO} at most."
        raise ImageError("too elongated", sentence)


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError("damaged picture", f"{name} is damaged or cut short: {first_sentence(error)}")


def _identify(name: str, file: BinaryIO, max_pixels: int, formats: tuple[str, ...]) -> Image.Image:
    """The image with its header read, but no pixels decoded."""
    too_large = f"more than the limit of {max_pixels:,} pixels"
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels", f"{name} has {too_large}.") from error
    except UnidentifiedImageError as error:
        known = ", ".join(formats)
        raise ImageError("not a picture", f"{name} is not a picture of a known format ({known}).") from error
    except Exception as error:
        raise _damaged(name, error) from error
    if image.width * image.height > max_pixels:
        raise ImageError("too many pixels", f"{name} is {image.width} x {image.height}, {too_large}.")
    check_sides(image, name)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
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
