"""TGV-KV."""

from sparsight.compression import Evict, LastQuery, TextGrounded, TextVision
from sparsight.compression.recipe import Recipe


def TGVKV(budget: float = 0.1, *, sinks: int = 4) -> Recipe:
    """TGV-KV: the text after the image ranks the image's entries and sets layer budgets; text is kept before vision.

    Liu, Han, Zhang, Shao, Liu, Guan, Wang: TGV-KV: Text-Grounded KV Eviction for Vision-Language Models, ICML 2026,
    arXiv 2606.03075.

    Score: attention of the text after the image, each of its tokens weighted by the attention that it receives from
    that text; text before vision. Allocation: layers whose text attends more to vision keep more. Reduction: sinks,
    the last token and the highest scores are kept; all KV heads of a layer share one choice. Decoding: each new entry
    that exceeds the budget replaces the one that the last token attended to least, outside the sinks and the text after
    the image.

    From the released code: text is ranked by the attention of all queries. Not from it: what a full layer cannot hold
    goes to the others, while there it is lost; in decoding the prompt's text after the image stays, while there as many
    of the most recent entries do; and as for other methods a new entry first replaces another and then is attended to.

    Args:
        budget: fraction of the tokens seen whose KV entries may be held, averaged over the layers, in (0, 1].
        sinks: number of entries at the start of the prompt that are always kept.
    """
    return Recipe(
        name="tgv-kv",
        budget=budget,
        score=TextGrounded(),
        allocate=TextVision(),
        reduce=Evict(recent=0, first=sinks, per_head=False),
        decode=LastQuery(sinks=sinks, per_head=False),
    )
