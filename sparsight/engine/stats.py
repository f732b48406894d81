"""What an engine is doing at the moment."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Load, memory and vision cache of an engine.

    Attributes:
        running: requests whose prompt is being processed, or with an answer that is being generated.
        kv_bytes: bytes of KV memory that the running answers occupy, at the longest length that each may reach.
        full_kv_bytes: bytes that the full cache would occupy for the same answers at the same length.
        host_bytes: bytes of full keys and values in host memory, of prompts that may come again and of those that
            running answers recall from.
        vision_hits: images and videos whose features came from the vision cache, since the engine was made.
        vision_misses: images and videos that were encoded.
    """

    running: int
    kv_bytes: int
    full_kv_bytes: int
    host_bytes: int
    vision_hits: int
    vision_misses: int
