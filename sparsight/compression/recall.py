"""The decode rule that fetches entries of the prompt back while the answer is generated."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from sparsight.compression.eviction import Grow
from sparsight.compression.key_index import Exact, KeyIndex
from sparsight.compression.score import POOLINGS, Grids, Window, as_window, pooled
from sparsight.utils import checks


@dataclass(frozen=True)
class Recall(Grow):
    """Every few tokens, hold those entries of the prompt that the newest token attends to.

    The first token of an answer, and every ``every``-th after it, ranks all positions of the prompt before it attends;
    so does the last token of a new turn, if the full cache is not kept for turns.
    Each KV head then holds the positions that rank highest, as many as it kept of the prompt and chosen as the recipe's
    reduction chooses; what it lacks is fetched from the full cache, in place of what ranks lowest. New entries are
    appended.

    Args:
        every: tokens from one ranking to the next.
        index: what the ranking knows of the keys.
        pool: width of the pooling along the sequence, or height and width on the images' patch grids; odd numbers.
        pooling: ``max`` or ``average``.
        prior: weight of the score that the recipe gave the prompt's positions, which is added to the ranking. The score
            must be on the scale of attention weights. With 0 only the newest token counts.
    """

    kind: ClassVar[str] = "recall"
    croppable: ClassVar[bool] = False
    recalls: ClassVar[bool] = True
    every: int = 4
    index: KeyIndex = field(default_factory=Exact)
    pool: Window = (1, 7)
    pooling: str = "max"
    prior: float = 0.0

    def __post_init__(self) -> None:
        checks.count("every", self.every, least=1)
        if not isinstance(self.index, KeyIndex):
            raise ValueError(f"index must be a key index such as Exact(), got {self.index!r}.")
        object.__setattr__(self, "pool", as_window(self.pool))
        checks.one_of("pooling", self.pooling, POOLINGS)
        checks.at_least("prior", self.prior, 0)

    def rank(self, query: Tensor, index: tuple[Tensor, ...], length: int, scaling: float, grids: Grids) -> Tensor:
        """How much attention each position of a prompt, or one near it, receives from a query, ``[H_kv, T]``.

        The attention is among the positions of the prompt, and averaged over the query heads of each KV head.

        Args:
            query: ``[H_kv, G, D]``.
            index: of the prompt's keys.
            length: ``T``.
            scaling: factor of the logits.
            grids: positions of the images' patches.
        """
        attention = self.index.logits(query.float() * scaling, index, length).softmax(-1)
        return pooled(attention.mean(1), self.pool, grids, self.pooling)
