"""Scores: how important each prompt position is, as attention summed over some query rows.

A score names the rows; :mod:`sparsight.observe` sums the attention that they pay, for every KV head.
"""

from dataclasses import dataclass
from typing import ClassVar

from sparsight.prompt import Span


@dataclass(frozen=True)
class PostVision:
    """Attention summed over the post-vision queries (VL-Cache, arXiv 2410.23317, section 4.2)."""

    kind: ClassVar[str] = "post-vision"

    def rows(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(span.post_vision, span.stop)


@dataclass(frozen=True)
class Accumulated:
    """Attention summed over every query of the prompt (H2O, arXiv 2306.14048; Elastic Cache, arXiv 2407.18121)."""

    kind: ClassVar[str] = "accumulated"

    def rows(self, span: Span) -> range:
        """Query positions whose attention is summed."""
        return range(span.start, span.stop)


Score = PostVision | Accumulated
