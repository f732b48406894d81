"""One answer on the engine, streamed and timed."""

from collections.abc import Callable
from typing import Any

from sparsight.cli.session import Session
from sparsight.compression.recipe import Recipe
from sparsight.engine.engine import Engine
from sparsight.engine.request import Completion, RequestError
from sparsight.engine.sampling import SamplingParams


def answer(
    session: Session,
    recipe: Recipe,
    max_new_tokens: int,
    prefill_chunk: int | None = None,
    prefill_bound: float | None = None,
    on_text: Callable[[str], Any] | None = None,
) -> Completion:
    """Answer a session's question greedily, prefilling ``prefill_chunk`` tokens at a time, or all at once if None.

    ``on_text`` is called with each piece of text as soon as it is decoded.

    Raises:
        ValueError: the request failed.
    """
    model = session.model
    params = SamplingParams.from_generation_config(
        model.generation_config, temperature=0.0, max_new_tokens=max_new_tokens
    )
    with Engine(
        model,
        session.processor,
        recipe,
        kv_memory=None,
        prefill_chunk=prefill_chunk,
        prefill_bound=prefill_bound,
        vision_bytes=0,
    ) as engine:
        handle = engine.add(inputs=session.inputs, params=params)
        try:
            for piece in handle:
                if on_text is not None:
                    on_text(piece.text)
        except RequestError as error:
            raise ValueError(str(error)) from error
        return handle.wait()[0]
