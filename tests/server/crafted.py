"""Images as attackers make them."""

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><image href="file:///etc/passwd"/></svg>'


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def png(width: int, height: int, *, before: bytes = b"", pixels: bytes = b"") -> bytes:
    """A PNG file of 8-bit grey pixels with this header, whatever its pixels are."""
    header = struct.pack("!IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header), before, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack("!I", len(content)) + kind + content + struct.pack("!I", zlib.crc32(kind + content))


def text_bomb() -> bytes:
    """A PNG file of one pixel with a text that inflates to 256 MiB."""
    text = zlib.compressobj(9)
    blocks = b"".join(text.compress(bytes(2**20)) for _ in range(256)) + text.flush()
    return png(1, 1, before=chunk(b"zTXt", b"Comment\0\0" + blocks), pixels=b"\0\0")


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG file whose last scan is repeated; each costs a pass over 16 million pixels, and 31 bytes."""
    content = encoded(Image.new("RGB", (4000, 4000), "red"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]
