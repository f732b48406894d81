"""The images of a request: data URLs, and links to the domains that the operator has named."""

import re

from PIL.Image import Image

from sparsight.server.fetch import Fetcher
from sparsight.server.image_pool import ImagePool, refusal

_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,64};base64,", re.IGNORECASE)


class ImageLoader:
    """Opens the images of requests, outside of the event loop's thread. Local files are never opened.

    Args:
        max_bytes: largest encoded image.
        max_pixels: largest image, read from its header before pixels are decoded.
        seconds: time to decode one image.
        max_decoded: pixels of decoded images, in use at the same time, from which on further images are rejected.
        fetcher: fetches images from links; None if links are refused.
    """

    def __init__(
        self, *, max_bytes: int, max_pixels: int, seconds: float, max_decoded: int, fetcher: Fetcher | None = None
    ) -> None:
        self.max_bytes, self.fetcher = max_bytes, fetcher
        self._pool = ImagePool(max_pixels=max_pixels, max_bytes=max_bytes, seconds=seconds, max_decoded=max_decoded)

    async def load(self, url: str) -> Image:
        """The image of a data URL or of a link, as upright RGB; of an animation the first frame.

        Raises:
            APIError: the URL or the image is refused (400), or too many images are in use (503).
        """
        if start := _DATA.match(url):
            # Four characters of base64 are three bytes; the last may be padding.
            if len(url) - start.end() > 4 * -(-self.max_bytes // 3):
                raise refusal(f"An image may have at most {self.max_bytes:,} bytes.")
            return await self._pool.decode(url[start.end() :].encode("ascii", "replace"), encoded=True)
        if self.fetcher is None:
            raise refusal("An image must be a data URL, data:image/png;base64,... for example; links are not fetched.")
        return await self._pool.decode(await self.fetcher.fetch(url))

    def close(self) -> None:
        """End the processes that decode images."""
        self._pool.close()
