"""Decodes images in a process of its own, so that a decoder that crashes or hangs does not take the server with it.

``python -m sparsight.server.image_worker MAX_PIXELS MEMORY`` writes :data:`READY`, then reads images from standard
input until it ends, and writes one result for each. An image is :data:`IMAGE`, whether base64 and the number of bytes,
and the bytes. A result is :data:`RESULT`, width and height, and RGB pixels; or 0 and a length, and the kind of error.
"""

import base64
import signal
import struct
import sys
from contextlib import suppress
from io import BytesIO

from PIL.Image import Image

from sparsight.models.images import ImageError, read_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Image formats that the server decodes; of an animation the first frame."""

READY = b"ready"
IMAGE = struct.Struct("!?I")
RESULT = struct.Struct("!II")


def main() -> None:
    """Decode images until there are no more."""
    max_pixels, memory = map(int, sys.argv[1:])
    # It ends with its standard input: the server still needs it while it drains after a signal to the process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Windows has no such limit.
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    target.write(READY)
    target.flush()
    while header := source.read(IMAGE.size):
        encoded, length = IMAGE.unpack(header)
        data = source.read(length)
        try:
            image = _decode(data, encoded, max_pixels)
            result = RESULT.pack(*image.size), image.tobytes()
        except (ImageError, MemoryError) as error:
            kind = (error.kind if isinstance(error, ImageError) else "damaged picture").encode()
            result = RESULT.pack(0, len(kind)), kind
        target.write(result[0])
        target.write(result[1])
        target.flush()


def _decode(data: bytes, encoded: bool, max_pixels: int) -> Image:
    if encoded:
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise ImageError("not base64", "The data is not valid base64.") from error
    return read_image(BytesIO(data), "A picture", max_pixels, FORMATS)


if __name__ == "__main__":
    main()
