"""Images of requests: which are accepted, and what is said of the others."""

import asyncio
import base64
import gc
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from PIL import Image

from sparsight.server.errors import APIError
from sparsight.server.images import ImageLoader
from sparsight.server.settings import Settings
from tests.server.crafted import SVG, data_url, encoded, png, scan_bomb, text_bomb

RED = Image.new("RGB", (8, 6), "red")

NOT_A_URL = "An image must be a data URL, data:image/png;base64,... for example; links are not fetched."
NOT_BASE64 = "The data of a data URL must be base64 with its padding and without spaces."
UNKNOWN_FORMAT = "An image must be in one of the formats PNG, JPEG, WEBP, GIF."
DAMAGED = "An image is damaged or cut short."
ELONGATED = "The sides of an image may differ by a factor of 200 at most."


def with_loader(work: Callable[[ImageLoader], Awaitable[Any]], **limits: Any) -> Any:
    async def run() -> Any:
        loader = ImageLoader(Settings(**limits))
        try:
            return await work(loader)
        finally:
            await loader.close()

    return asyncio.run(run())


def load(url: str, **limits: Any) -> Image.Image:
    return with_loader(lambda loader: loader.load(url), **limits)


def refused(url: str, **limits: Any) -> str:
    with pytest.raises(APIError) as raised:
        load(url, **limits)
    assert (raised.value.status, raised.value.param, raised.value.code) == (400, "image_url", "invalid_image")
    return raised.value.message


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_accepted_formats_arrive_as_rgb(format: str) -> None:
    image = load(data_url(encoded(RED, format), "IMAGE/x-anything"))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    red, green, blue = image.getpixel((4, 3))
    assert red > 250 and green < 5 and blue < 5


def test_the_first_frame_of_an_animation_is_taken() -> None:
    animation = encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")])
    assert load(data_url(animation)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/etc/passwd",
        "examples/receipt-1.png",
        "file:///etc/passwd",
        "http://127.0.0.1/a.png",
        "https://example.com/a.png",
        "ftp://example.com/a.png",
        "\\\\example.com\\a.png",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "data:\u0131mage/png;base64,AAAA",
        "data:image/png;charset=utf-8;base64,AAAA",
        "data:image/png;base64",
        " data:image/png;base64,AAAA",
        f"data:image/{'a' * 100};base64,AAAA",
    ],
)
def test_only_data_urls_of_images_are_opened(url: str) -> None:
    assert refused(url) == NOT_A_URL


@pytest.mark.parametrize("data", ["A", "AAA", "AA\nAA", "AAAA ", "AA==AAAA", "A-_A", "%41AAA", "\u0661AAA", "=AAA"])
def test_base64_is_strict(data: str) -> None:
    assert refused(f"data:image/png;base64,{data}") == NOT_BASE64


@pytest.mark.parametrize("format", ["EPS", "BMP", "TIFF", "PPM", "ICO", "PDF", "PCX", "TGA", "JPEG2000"])
def test_other_formats_are_refused_under_an_accepted_name(format: str) -> None:
    image = Image.new("RGB", (32, 32), "red")
    assert refused(data_url(encoded(image, format))) == UNKNOWN_FORMAT


@pytest.mark.parametrize("content", [b"", SVG, b"8BPS\0\1" + bytes(20), b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_raster_image_is_refused(content: bytes) -> None:
    assert refused(data_url(content)) == UNKNOWN_FORMAT


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF"])
def test_a_truncated_image_is_refused(format: str) -> None:
    noise = Image.effect_noise((64, 64), 100).convert("RGB")
    content = encoded(noise, format)
    assert refused(data_url(content[: len(content) // 2])) == DAMAGED


def test_pixels_are_counted_before_they_are_decoded() -> None:
    # Its pixels are missing: decoded, it would be damaged.
    assert refused(data_url(png(50_000, 50_000))) == "An image may have at most 16,777,216 pixels."
    assert refused(data_url(encoded(RED)), max_image_pixels=47) == "An image may have at most 47 pixels."
    assert load(data_url(encoded(RED)), max_image_pixels=48).size == (8, 6)


def test_extreme_shapes() -> None:
    assert load(data_url(encoded(Image.new("RGB", (1, 1), "red")))).getpixel((0, 0)) == (255, 0, 0)
    assert refused(data_url(png(1, 100_000))) == ELONGATED
    assert refused(data_url(png(100_000, 1))) == ELONGATED
    assert refused(data_url(png(0, 5))) == UNKNOWN_FORMAT


def test_a_text_that_inflates_is_not_inflated() -> None:
    content = text_bomb()
    assert len(content) < 300_000
    assert refused(data_url(content)) == DAMAGED


def test_bytes_are_counted_before_they_are_decoded() -> None:
    sentence = "An image may have at most 1,000 bytes."
    # Decoded, it would not be base64.
    assert refused("data:image/png;base64," + "!" * 1340, max_image_bytes=1000) == sentence
    assert refused(data_url(bytes(1001)), max_image_bytes=1000) == sentence
    assert refused(data_url(bytes(1000)), max_image_bytes=1000) == UNKNOWN_FORMAT


def test_an_image_that_takes_too_long_is_given_up() -> None:
    async def work(loader: ImageLoader) -> Image.Image:
        with pytest.raises(APIError, match=r"^An image takes too long to decode\.$"):
            await loader.load(data_url(scan_bomb(100_000)))
        return await loader.load(data_url(encoded(RED)))

    assert with_loader(work, image_seconds=1.0).size == (8, 6)


def test_a_request_that_is_cancelled_leaves_nothing_behind() -> None:
    async def work(loader: ImageLoader) -> list[Any]:
        blue = data_url(encoded(Image.new("RGB", (2000, 2000), "blue")))
        loads = [asyncio.ensure_future(loader.load(blue)) for _ in range(8)]
        await asyncio.sleep(0.05)
        for each in loads:
            each.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        return [(await loader.load(data_url(encoded(RED)))).getpixel((0, 0)) for _ in range(4)]

    assert with_loader(work) == [(255, 0, 0)] * 4


def test_a_dead_worker_is_replaced() -> None:
    async def work(loader: ImageLoader) -> Image.Image:
        await loader.load(data_url(encoded(RED)))
        (process,) = loader.pool.idle
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        return await loader.load(data_url(encoded(RED)))

    assert with_loader(work).size == (8, 6)


def test_images_in_use_are_limited() -> None:
    async def work(loader: ImageLoader) -> None:
        url = data_url(encoded(RED))
        images = [await loader.load(url), await loader.load(url)]
        with pytest.raises(APIError) as raised:
            await loader.load(url)
        assert (raised.value.status, raised.value.retry_after) == (503, 1)
        del images[0]
        gc.collect()
        await loader.load(url)

    with_loader(work, max_decoded_pixels=96)


def test_several_images_arrive_in_order() -> None:
    async def work(loader: ImageLoader) -> list[Any]:
        urls = [data_url(encoded(Image.new("RGB", (size, 9)))) for size in range(1, 20)]
        return await asyncio.gather(*map(loader.load, urls))

    assert [image.width for image in with_loader(work)] == list(range(1, 20))


def test_padding_of_every_length_is_accepted() -> None:
    # Trailing bytes after the end of a PNG file are ignored.
    for extra in range(3):
        content = encoded(RED) + bytes(extra)
        assert base64.b64encode(content).count(b"=") == -len(content) % 3
        assert load(data_url(content)).size == (8, 6)
