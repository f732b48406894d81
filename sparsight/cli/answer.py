"""One answer of a model, streamed and timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, TextStreamer

from sparsight.cli.session import Session
from sparsight.engine.model_runner import capture_options
from sparsight.eval.metrics import same_tokens


@dataclass(frozen=True)
class Answer:
    """What a model answered, and how long it took.

    Args:
        text: the answer without special tokens.
        tokens: its token ids, special ones included.
        prefill_seconds: until the first token.
        decode_seconds: from the first token to the last.
    """

    text: str
    tokens: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float


def answer(
    ready: Session,
    cache: Cache,
    max_new_tokens: int,
    prefill_chunk: int | None = None,
    on_text: Callable[[str], Any] | None = None,
) -> Answer:
    """Let a model answer greedily, given the prompt ``prefill_chunk`` tokens at a time.

    ``on_text`` is given the text as it comes, piece by piece.
    """
    stream = _Stream(ready.tokenizer, on_text)
    started = time.perf_counter()
    output = ready.model.generate(
        **ready.inputs,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        prefill_chunk_size=prefill_chunk,
        streamer=stream,
        **capture_options(cache, stream),
    )
    tokens = tuple(output[0, ready.inputs["input_ids"].shape[1] :].tolist())
    return Answer(
        text=ready.tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prefill_seconds=stream.times[0] - started,
        decode_seconds=stream.times[-1] - stream.times[0],
    )


def agreement(one: Answer, other: Answer) -> float:
    """Share of equal tokens, place by place, over the longer answer."""
    return same_tokens(one.tokens, other.tokens)


class _Stream(TextStreamer):
    """Hands text on as it comes, and notes when each token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], Any] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text is not None:
            self.on_text(text)
