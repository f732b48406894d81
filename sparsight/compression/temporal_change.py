"""The score of InfiniPot-V: what changed in a video, then the largest values. It does not depend on the question."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.compression.score import AttentionSums, BaseScore, Grids, PromptStates
from sparsight.models.prompt import Span
from sparsight.utils import checks


@dataclass(frozen=True)
class TemporalChange(BaseScore):
    """Patches of a video that differ from its last frames, then the largest values (InfiniPot-V, arXiv 2506.15745).

    A patch of an earlier frame is important if its key differs from those of the last frames at the same place. A share
    of the vision tokens kept goes to the last frames, the later first, and then to the most important patches of the
    other frames; the rest goes to the largest values. Text comes before vision.

    Args:
        change: share of the vision tokens kept that are chosen by change (the paper's ``alpha``).
        last: fraction of a video's frames that the others are compared with, at least one.
    """

    kind: ClassVar[str] = "temporal-change"
    needs_full_prompt: ClassVar[bool] = True
    needs_frames: ClassVar[bool] = True
    change: float = 0.5
    last: float = 0.25

    def __post_init__(self) -> None:
        checks.fraction("change", self.change, zero=True)
        checks.fraction("last", self.last)

    def queries(self, span: Span) -> range:
        """No query is looked at."""
        return range(span.stop, span.stop)

    def finish(self, attention: AttentionSums, states: PromptStates) -> Tensor:
        """Score ``[H_kv, T]`` of the complete prompt: above 2 for text, above 1 for what is chosen by change."""
        norms = states.value.float().norm(dim=-1)
        score = norms / norms.amax(-1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)
        text = ~states.vision
        room = max(states.kept - int(text.sum()), 0)
        changed = temporal_change(states.key, states.frames, self.last)
        in_videos = sum(video.numel() for video in states.frames if len(video) > 1)
        count = min(room - round((1 - self.change) * room), in_videos)
        chosen = changed.topk(count, dim=-1).indices
        score = score.scatter_add(1, chosen, torch.ones_like(chosen, dtype=score.dtype))
        return score + 2 * text

    def importance(self, sums: Tensor, vision: Tensor, grids: Grids) -> Tensor:
        """Score ``[H_kv, T]``, as :meth:`finish` makes it."""
        return sums


def temporal_change(key: Tensor, frames: Sequence[Tensor], last: float) -> Tensor:
    """How much each patch of a video differs from the same patch of its last frames.

    Args:
        key: ``[H_kv, T, D]``.
        frames: positions ``[F, patches]`` of each video.
        last: fraction of the frames that are its last ones.

    Returns:
        float32 ``[H_kv, T]``: the negative mean cosine of the keys, the position and more for the last frames, and
        -inf for what is in no video of several frames.
    """
    heads, length, _ = key.shape
    change = torch.full((heads, length), -torch.inf, device=key.device)
    for video in frames:
        if len(video) == 1:
            continue
        recent = max(1, int(len(video) * last))
        unit = functional.normalize(key[:, video].float(), dim=-1)
        # The mean cosine is the cosine's numerator with the mean of the unit keys.
        change[:, video[:-recent]] = -(unit[:, :-recent] * unit[:, -recent:].mean(1, keepdim=True)).sum(-1)
        change[:, video[-recent:]] = (video[-recent:] + 2).float()
    return change
