"""What scores that are made from another score have in common."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sparsight.compression.score import AttentionSums, BaseScore, Grids, LastWindow
from sparsight.models.prompt import Span

SNAPKV = LastWindow(pool=5, pooling="average")
"""SnapKV's score as in the code of MixKV and BACON: what they wrap unless another score is given."""


@dataclass(frozen=True)
class WrappedScore(BaseScore):
    """A score that changes another one once the prompt is complete, in :meth:`finish`.

    Args:
        score: the other one, which says what is observed.
    """

    needs_full_prompt: ClassVar[bool] = True
    score: BaseScore = SNAPKV

    @property
    def before_rope(self) -> bool:  # type: ignore[override]  # a constant of other scores
        """As the wrapped score."""
        return self.score.before_rope

    @property
    def needs_frames(self) -> bool:  # type: ignore[override]  # a constant of other scores
        """As the wrapped score."""
        return self.score.needs_frames

    @property
    def needs_question(self) -> bool:  # type: ignore[override]  # a constant of other scores
        """As the wrapped score."""
        return self.score.needs_question

    @property
    def pool(self) -> Any:
        """The window that the wrapped score is pooled in."""
        return getattr(self.score, "pool", 1)

    def within(self, most: int) -> Self:
        """The same around a score with a window of at most ``most`` queries."""
        return replace(self, score=self.score.within(most))

    def queries(self, span: Span) -> range:
        """Those of the wrapped score."""
        return self.score.queries(span)

    def accumulator(self, heads: int, span: Span, device: torch.device) -> AttentionSums:
        """That of the wrapped score."""
        return self.score.accumulator(heads, span, device)

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """That of the wrapped score."""
        return self.score.importance(sums, vision, grids)
