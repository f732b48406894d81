"""Limits of the server, each checked before the work that it bounds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the server accepts.

    Args:
        max_connections: open connections; further ones are rejected with 503.
        max_queue: requests that wait until their first token; further ones are rejected with 503.
        max_new_tokens: longest answer in tokens, and the default of chat completions.
        max_answers: answers to one prompt (``n``).
        max_messages: messages of a conversation.
        max_images: images of a request.
        max_text: characters of all texts of a request together.
        max_image_bytes: largest encoded image.
        max_image_pixels: largest image, read from its header before anything is decoded.
        max_decoded_pixels: pixels of decoded images in use; further images are rejected with 503 until some are not.
        image_seconds: time to decode an image.
        fetch_seconds: time to fetch an image from a link.
        max_body_bytes: largest request body.
        max_bodies_bytes: bytes of all bodies that are being read; further ones are rejected with 503.
        body_seconds: time for a body to arrive.
        max_headers: headers of a request.
        max_header_bytes: bytes of a request's headers and path.
        header_seconds: time for a request's headers to arrive.
        send_seconds: time that a client may stop to read its response.
        requests_per_minute: requests of one API key, or of all clients if there are no keys; None for any number.
        kept_requests: finished requests of which the entries kept can be looked up.
        drain_seconds: time that running requests have to finish after a signal to stop.
        log_prompts: whether the access log has the texts of requests.
    """

    max_connections: int = 512
    max_queue: int = 128
    max_new_tokens: int = 1024
    max_answers: int = 8
    max_messages: int = 256
    max_images: int = 16
    max_text: int = 2**20
    max_image_bytes: int = 10 * 2**20
    max_image_pixels: int = 2**24
    max_decoded_pixels: int = 2**28
    image_seconds: float = 10.0
    fetch_seconds: float = 10.0
    max_body_bytes: int = 2**24
    max_bodies_bytes: int = 2**28
    body_seconds: float = 60.0
    max_headers: int = 100
    max_header_bytes: int = 2**14
    header_seconds: float = 10.0
    send_seconds: float = 30.0
    requests_per_minute: int | None = None
    kept_requests: int = 64
    drain_seconds: float = 30.0
    log_prompts: bool = False
