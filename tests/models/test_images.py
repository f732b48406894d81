import os
import socket
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from sparsight.models.images import FORMATS, ImageError, open_image

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [128, 128, 128], [255, 255, 255]]], np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_opens_as_rgb(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"picture.{name.lower()}"
    # Blocks of one colour survive lossy formats.
    blocks = COLOURS.repeat(16, 0).repeat(16, 1)
    Image.fromarray(blocks).save(path, format=name, **({"quality": 95} if name in ("JPEG", "WEBP") else {}))
    image = open_image(path)
    assert image.mode == "RGB"
    assert image.size == (48, 32)
    assert np.abs(pixels(image)[8::16, 8::16].astype(int) - COLOURS).max() <= 4


def test_the_format_is_read_from_the_content_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.txt"
    Image.fromarray(COLOURS).save(path, format="PNG")
    assert (pixels(open_image(path)) == COLOURS).all()


def test_postscript_is_refused_under_any_name(tmp_path: Path) -> None:
    for name in ("picture.eps", "picture.png"):
        path = tmp_path / name
        Image.fromarray(COLOURS).save(path, format="EPS")
        with pytest.raises(ValueError, match="is not a picture of a known format"):
            open_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 1000, b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_not_an_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"picture\.png (is not a picture|is damaged)"):
        open_image(path)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["refused elsewhere", "accepted elsewhere"])
def test_a_truncated_image_is_refused(
    tmp_path: Path, name: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture"
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format=name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", elsewhere)
    with pytest.raises(ValueError, match=r"picture (is damaged or cut short|is not a picture)"):
        open_image(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read .*nothing\.png: No such file"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match=r"Cannot read .*: Is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.png"
    server = socket.socket(socket.AF_UNIX)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        server.bind(str(path))
    with server, pytest.raises(ImageError, match=rf"^Cannot read {path}: [^.]+\.$") as refused:
        open_image(path)
    assert refused.value.kind == "unreadable file"


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/cat.png",
        "http://example.com/cat.png",
        Path("https://example.com/cat.png"),
        "file:///etc/hostname",
        "data:image/png;base64," + "A" * 10_000,
    ],
)
def test_urls_are_refused_with_what_is_accepted_instead(url: str | Path) -> None:
    with pytest.raises(ImageError, match=r"is a URL: images are given as paths of local files\.$") as refused:
        open_image(url)
    assert len(str(refused.value)) < 300


def test_a_file_with_the_name_of_a_url_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(COLOURS).save(tmp_path / "data:picture", format="PNG")
    assert (pixels(open_image("data:picture")) == COLOURS).all()


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n"])
def test_messages_escape_control_characters_of_names(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a\x1b[31m\nb.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError) as refused:
        open_image(path)
    assert r"a\x1b[31m\nb.png" in str(refused.value)
    assert str(refused.value).isprintable()


def png(path: Path, width: int, height: int) -> Path:
    """An image of any size in a few bytes."""
    Image.new("1", (width, height)).save(path)
    return path


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (60_000, 1), (3, 601)])
def test_elongated_images_are_refused_before_decoding(
    tmp_path: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = png(tmp_path / "picture.png", width, height)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=f"picture.png is {width} x {height}: its sides may differ by a factor of 200"):
        open_image(path)


@pytest.mark.parametrize(("width", "height"), [(1, 200), (400, 2), (800, 40_000)])
def test_receipts_and_panoramas_are_not_elongated(tmp_path: Path, width: int, height: int) -> None:
    assert open_image(png(tmp_path / "picture.png", width, height)).size == (width, height)


def huge_png(path: Path, side: int) -> Path:
    """A few bytes with the header of an image of ``side x side`` pixels, which decoding would allocate."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    return path


@pytest.mark.parametrize("side", [10_000, 30_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="more than the limit of 89,478,485 pixels"):
        open_image(huge_png(tmp_path / "huge.png", side))


def test_the_limit_counts_pixels(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(COLOURS).save(path)
    assert open_image(path, max_pixels=6).size == (3, 2)
    with pytest.raises(ValueError, match="is 3 x 2, more than the limit of 5 pixels"):
        open_image(path, max_pixels=5)


def test_a_higher_limit_admits_larger_images_and_restores_pillows_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), "red").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="more than the limit of 100 pixels"):
        open_image(path, max_pixels=100)
    assert open_image(path, max_pixels=1600).size == (40, 40)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert not recwarn.list
    with pytest.raises(ValueError, match="more than the limit of 1,599 pixels"):
        open_image(path, max_pixels=1599)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_higher_limit_holds_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), "red").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    sizes = []
    threads = [threading.Thread(target=lambda: sizes.append(open_image(path, 1600).size)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(40, 40)] * 8
    assert Image.MAX_IMAGE_PIXELS == 100


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # To be shown turned by 90 degrees clockwise.
    Image.fromarray(COLOURS).save(path, exif=exif)
    assert (pixels(open_image(path)) == np.rot90(COLOURS, -1)).all()


def test_transparency_shows_white(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(path)
    assert (pixels(open_image(path)) == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 1), 1)
    palette.save(path, transparency=0)
    assert pixels(open_image(path))[0, 0].tolist() == [255, 255, 255]
    assert pixels(open_image(path))[1, 1].tolist() == [0, 0, 255]


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(path)
    assert pixels(open_image(path))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "picture.gif"
    Image.new("RGB", (4, 4), "red").save(path, save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    assert (pixels(open_image(path)) == [255, 0, 0]).all()
