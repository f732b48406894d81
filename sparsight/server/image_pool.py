"""Decoding untrusted images in worker processes, with limits on pixels, memory and time."""

import asyncio
import os
import sys
import weakref
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress

import anyio
from PIL import Image

from sparsight.models.images import MAX_RATIO
from sparsight.server.errors import APIError
from sparsight.server.image_worker import FORMATS, IMAGE, READY, RESULT

WORKERS = max(2, min(8, (os.cpu_count() or 1) // 2))
"""Images that are decoded at the same time."""

START_SECONDS = 60


class ImagePool:
    """Decodes images in processes; one that takes too long is killed and replaced.

    Args:
        max_pixels: largest image, read from its header before pixels are decoded.
        max_bytes: largest encoded image.
        max_decoded: pixels of decoded images, in use at the same time, from which on further images are rejected.
        seconds: time to decode one image.
    """

    def __init__(self, *, max_pixels: int, max_bytes: int, max_decoded: int, seconds: float) -> None:
        self.max_pixels, self.seconds, self.max_decoded = max_pixels, seconds, max_decoded
        # For the decoder and the conversions to RGB, and for the interpreter with its libraries.
        self._memory = 40 * max_pixels + 8 * max_bytes + 2**29
        self._places = asyncio.Semaphore(WORKERS)
        self.idle: list[Process] = []
        self._decoded = 0

    async def decode(self, data: bytes, *, encoded: bool = False) -> Image.Image:
        """An image as upright RGB.

        Args:
            data: the content of an image file.
            encoded: whether it is base64.

        Raises:
            APIError: the image is refused (400), or too many others are in use (503).
        """
        async with self._places:
            if self._decoded >= self.max_decoded:
                message = "The server is busy: too many images are in use."
                raise APIError(503, message, kind="server_error", code="overloaded", retry_after=1)
            process = await self._worker()
            try:
                with anyio.fail_after(self.seconds):
                    width, height, content = await _exchange(process, data, encoded)
            except BaseException as error:
                await _end(process)
                if isinstance(error, TimeoutError):
                    raise refusal("An image takes too long to decode.") from error
                if isinstance(error, OSError | asyncio.IncompleteReadError):
                    raise self._refused("damaged picture") from error
                raise
            self.idle.append(process)
        if not width:
            raise self._refused(content.decode())
        image = await asyncio.to_thread(Image.frombytes, "RGB", (width, height), content)
        self._decoded += width * height
        weakref.finalize(image, self._release, width * height)
        return image

    async def close(self) -> None:
        """End the processes."""
        while self.idle:
            await _end(self.idle.pop())

    async def _worker(self) -> Process:
        while self.idle:
            process = self.idle.pop()
            # None as long as it runs.
            if process.returncode is None:
                return process
        return await self._start()

    async def _start(self) -> Process:
        command = sys.executable, "-m", "sparsight.server.image_worker", str(self.max_pixels), str(self._memory)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        assert process.stdout is not None
        try:
            with anyio.fail_after(START_SECONDS):
                await process.stdout.readexactly(len(READY))
        except BaseException:
            await _end(process)
            raise
        return process

    def _release(self, pixels: int) -> None:
        self._decoded -= pixels

    def _refused(self, kind: str) -> APIError:
        return refusal(
            {
                "not base64": "The data of a data URL must be base64 with its padding and without spaces.",
                "not a picture": f"An image must be in one of the formats {', '.join(FORMATS)}.",
                "too many pixels": f"An image may have at most {self.max_pixels:,} pixels.",
                "too elongated": f"The sides of an image may differ by a factor of {MAX_RATIO} at most.",
            }.get(kind, "An image is damaged or cut short.")
        )


async def _exchange(process: Process, data: bytes, encoded: bool) -> tuple[int, int, bytes]:
    """Width, height and pixels of an image; or 0, a length, and the kind of error."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(IMAGE.pack(encoded, len(data)))
    process.stdin.write(data)
    await process.stdin.drain()
    width, height = RESULT.unpack(await process.stdout.readexactly(RESULT.size))
    return width, height, await process.stdout.readexactly(3 * width * height if width else height)


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    # Also for a request that is being cancelled.
    with anyio.CancelScope(shield=True):
        await process.wait()


def refusal(message: str) -> APIError:
    """The error for an image that is not accepted."""
    return APIError(400, message, param="image_url", code="invalid_image")
