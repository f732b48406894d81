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
    """A model's answer and the time it took.

    Args:
        text: the answer without special tokens.
        tokens: its token ids, including special ones.
        finish_reason: ``stop`` if the model ended the answer, ``length`` if it reached the maximum length.
        prefill_seconds: time to the first token.
        decode_seconds: time from the first token to the last.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float


def answer(
    session: Session,
    cache: Cache,
    max_new_tokens: int,
    prefill_chunk: int | None = None,
    on_text: Callable[[str], Any] | None = None,
) -> Answer:
    """Answer a session's question greedily, prefilling ``prefill_chunk`` tokens at a time, or all at once if None.

    ``on_text`` is called with each piece of text as soon as it is decoded.
    """
    stream = _Stream(session.tokenizer, on_text)
    started = time.perf_counter()
    output = session.model.generate(
        **session.inputs,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        prefill_chunk_size=prefill_chunk,
        streamer=stream,
        **capture_options(cache, stream),
    )
    tokens = tuple(output[0, session.inputs["input_ids"].shape[1] :].tolist())
    end = session.model.generation_config.eos_token_id
    return Answer(
        text=session.tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        finish_reason="stop" if tokens[-1] in (end if isinstance(end, list) else [end]) else "length",
        prefill_seconds=stream.times[0] - started,
        decode_seconds=stream.times[-1] - stream.times[0],
    )


def agreement(one: Answer, other: Answer) -> float:
    """Share of positions with equal tokens, over the length of the longer answer."""
    return same_tokens(one.tokens, other.tokens)


class _Stream(TextStreamer):
    """Passes text on as it is decoded, and records when each token arrived."""

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
