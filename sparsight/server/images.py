"""The images of a request: data URLs, and links to the domains that the operator has named."""

import re

from PIL.Image import Image

from sparsight.server.fetch import Fetcher
from sparsight.server.image_pool import ImagePool, refusal
from sparsight.server.settings import Settings

_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,64};base64,", re.IGNORECASE | re.ASCII)


class ImageLoader:
    """Opens the images of requests, outside of the event loop's thread. Local files are never opened.

    Args:
        settings: the limits.
        fetcher: fetches images from links; None if links are refused.
    """

    def __init__(self, settings: Settings, fetcher: Fetcher | None = None) -> None:
        self.max_bytes, self.fetcher = settings.max_image_bytes, fetcher
        self.pool = ImagePool(
            max_pixels=settings.max_image_pixels,
            max_bytes=settings.max_image_bytes,
            max_decoded=settings.max_decoded_pixels,
            seconds=settings.image_seconds,
        )

    async def load(self, url: str) -> Image:
        """The image of a data URL or of a link, as upright RGB; of an animation the first frame.

        Raises:
            APIError: the URL or the image is refused (400), or too many images are in use (503).
        """
        if start := _DATA.match(url):
            # Four characters of base64 are three bytes, except for the padding.
            if (len(url) - start.end()) // 4 * 3 - url.count("=", -2) > self.max_bytes:
                raise refusal(f"An image may have at most {self.max_bytes:,} bytes.")
            return await self.pool.decode(url[start.end() :].encode("ascii", "replace"), encoded=True)
        if self.fetcher is None:
            raise refusal("An image must be a data URL, data:image/png;base64,... for example; links are not fetched.")
        return await self.pool.decode(await self.fetcher.fetch(url))

    async def close(self) -> None:
        """End the processes that decode images."""
        await self.pool.close()
