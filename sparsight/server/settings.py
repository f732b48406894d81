"""Limits of the server, each checked before the work that it bounds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the server accepts.

    Args:
        max_queue: requests that wait until their first token; further ones are rejected with 503.
        max_new_tokens: longest answer in tokens, and the default of chat completions.
        max_answers: answers to one prompt (``n``).
        max_messages: messages of a conversation.
        max_images: images of a request.
        max_text: characters of all texts of a request together.
        kept_requests: finished requests of which the entries kept can be looked up.
        drain_seconds: time that running requests have to finish after a signal to stop.
        log_prompts: whether the access log has the texts of requests.
    """

    max_queue: int = 128
    max_new_tokens: int = 1024
    max_answers: int = 8
    max_messages: int = 256
    max_images: int = 16
    max_text: int = 2**20
    kept_requests: int = 64
    drain_seconds: float = 30.0
    log_prompts: bool = False
