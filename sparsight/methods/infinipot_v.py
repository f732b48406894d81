"""InfiniPot-V."""

from sparsight.compression import Evict, Grow, TemporalChange, Uniform
from sparsight.compression.recipe import Recipe


def InfiniPotV(budget: float = 0.1, *, change: float = 0.5, last: float = 0.25) -> Recipe:
    """InfiniPot-V: a video's last frames, the patches that differ from them, and the largest values.

    Kim et al.: InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video Understanding, NeurIPS 2025,
    arXiv 2506.15745.

    Score: text, then the last frames and the patches whose keys are least like those of the last frames at the same
    place, then the norm of the value. Allocation: the same budget for each layer. Reduction: each KV head evicts its
    lowest scores. Decoding: new entries are appended.

    From the authors' code: cosines of keys at the same patch, averaged over the last frames; the last frames come
    first; value norms fill the budget. Different here: the complete prompt is compressed once, not a stream block by
    block; where the budget is smaller than the last frames, the later of them stay; the norms are not pooled, which
    differs by layer there; all text comes before vision; images of one size in a row count as frames. Prompts without
    several frames keep the largest values.

    Args:
        budget: fraction of the prompt's KV entries that each layer keeps, in (0, 1].
        change: share of the vision tokens kept that are chosen by change over time, in [0, 1].
        last: fraction of a video's frames that the others are compared with.
    """
    return Recipe(
        name="infinipot-v",
        budget=budget,
        score=TemporalChange(change=change, last=last),
        allocate=Uniform(),
        reduce=Evict(recent=0),
        decode=Grow(),
    )
