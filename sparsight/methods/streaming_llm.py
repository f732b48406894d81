"""StreamingLLM."""

from sparsight.compression import Evict, Recency, Sliding, Uniform
from sparsight.compression.recipe import Recipe


def StreamingLLM(budget: float = 0.1, *, sinks: int = 4) -> Recipe:
    """StreamingLLM, also called Local: the first few entries and the most recent ones, in a window that slides.

    Xiao et al.: Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453. Keys keep the
    rotary position of their token, and the window grows with the tokens seen, so that a budget means the same under
    every decode rule; the paper renumbers positions and holds a fixed number.

    Args:
        budget: fraction of the prompt's KV entries that may be held, during prefill and decoding.
        sinks: entries at the prompt's beginning that always stay.
    """
    return Recipe(
        name="streaming-llm",
        budget=budget,
        score=Recency(),
        allocate=Uniform(),
        reduce=Evict(recent=0, first=sinks),
        decode=Sliding(sinks=sinks),
    )
