"""StreamingLLM."""

from sparsight.compression import Evict, Recency, Sliding, Uniform
from sparsight.compression.recipe import Recipe


def StreamingLLM(budget: float = 0.1, *, sinks: int = 4) -> Recipe:
    """StreamingLLM, also called Local: the first entries (attention sinks) and a sliding window of the most recent.

    Xiao et al.: Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453.

    Score: recency. Allocation: the same budget for each layer. Reduction: everything between the sinks and the window
    is evicted. Decoding: each new entry that exceeds the budget replaces the oldest entry after the sinks.

    The paper renumbers positions and uses a window of fixed size. Here keys keep the rotary position of their token,
    and the window grows with the tokens seen, so that a budget means the same for all decode rules.

    Args:
        budget: fraction of the tokens seen whose KV entries a layer may hold, after prefill and during decoding.
        sinks: number of entries at the start of the prompt that are always kept.
    """
    return Recipe(
        name="streaming-llm",
        budget=budget,
        score=Recency(),
        allocate=Uniform(),
        reduce=Evict(recent=0, first=sinks),
        decode=Sliding(sinks=sinks),
    )
