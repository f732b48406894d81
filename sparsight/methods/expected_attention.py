"""Expected Attention."""

from sparsight.compression import Evict, FutureQueries, Grow, Uniform
from sparsight.compression.recipe import Recipe


def ExpectedAttention(budget: float = 0.1, *, future: int = 512, sinks: int = 4) -> Recipe:
    """Expected Attention: what future queries are expected to attend to, whatever the question is.

    Devoto, Jeblick, Jégou: Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution, arXiv 2510.00636.

    Score: expected attention of Gaussian queries with the prompt's mean and covariance before RoPE, rotated to the
    positions after the prompt, times the norm of the value. Allocation: the same budget for each layer. Reduction:
    each KV head keeps the sinks and evicts its lowest scores. Decoding: new entries are appended.

    From the paper: the score. From the authors' code (kvpress): the average of the rotation matrices over 512
    positions, the statistics without the 4 sinks, softmax weights averaged over the query heads of a KV head. Not taken
    from it: a constant added to the weights, which some of its settings have. The heads of a layer keep the same
    number of entries; ``combined(allocate="across-heads")`` lets them compete. The last entry always stays. Queries
    before RoPE are the model's, rotated back, so that models with normalised queries and multimodal RoPE are supported.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        future: number of positions after the prompt that the rotation is averaged over.
        sinks: number of entries at the start of the prompt that are always kept and left out of the statistics.
    """
    return Recipe(
        name="expected-attention",
        budget=budget,
        score=FutureQueries(future=future, sinks=sinks),
        allocate=Uniform(),
        reduce=Evict(recent=0, first=sinks),
        decode=Grow(),
    )
