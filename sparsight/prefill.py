"""One layer during prefill: the whole prompt's keys and values, and what its queries told about them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.entries import Entries
from sparsight.observe import attention_sums, visible_pairs
from sparsight.parts import PostVision
from sparsight.prompt import Prompt
from sparsight.recipe import Recipe


class Prefill:
    """Keys and values of the prompt so far, its scores, and the sparsity of its post-vision queries.

    Attributes:
        keys, values: ``[B, H_kv, seen, D]``.
        scores: ``[H_kv, T_b]`` for each sequence: attention sums, until :meth:`finish` makes scores of them.
        zeroed: how many weights of each sequence's post-vision rows the threshold filter zeroes in all heads, int64.
        visible: how many weights those rows have, int64.
    """

    def __init__(self, recipe: Recipe, prompt: Prompt, keys: Tensor, values: Tensor) -> None:
        self.recipe = recipe
        self.prompt = prompt
        self.keys, self.values = _alone(keys), _alone(values)
        heads, device = keys.shape[1], keys.device
        self.scores = [torch.zeros(heads, span.length, device=device) for span in prompt.spans]
        self.zeroed = torch.zeros(len(prompt.spans), dtype=torch.int64, device=device)
        self.visible = torch.zeros_like(self.zeroed)

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of the prompt's next part."""
        self.keys = torch.cat([self.keys, keys.detach()], dim=2)
        self.values = torch.cat([self.values, values.detach()], dim=2)

    @torch.no_grad()
    def observe(self, query: Tensor, scaling: float, visible: Tensor | None = None) -> None:
        """Add the attention that the newest queries ``[B, H, q, D]`` pay to the scores and the sparsity.

        ``visible`` ``[B or 1, 1, q, seen]`` tells the keys that each query sees, where it is not those before it.
        """
        score, threshold = self.recipe.score, self.recipe.allocate.threshold
        for row, span in enumerate(self.prompt.spans):
            seen = None if visible is None else visible[min(row, len(visible) - 1), 0]
            post_vision = PostVision().rows(span)
            # Scores and sparsity come from one pass where they come from the same rows.
            together = score.rows(span) == post_vision
            sums = self._sums(row, score.rows(span), query, scaling, threshold if together else None, seen)
            if threshold is not None and not together:
                self._sums(row, post_vision, query, scaling, threshold, seen)
            if sums is not None:
                self.scores[row][:, : sums.shape[1]] += sums

    def _sums(
        self, row: int, rows: range, query: Tensor, scaling: float, threshold: float | None, visible: Tensor | None
    ) -> Tensor | None:
        """:func:`attention_sums` of those of a sequence's ``rows`` that are among the newest queries.

        With a threshold, what it zeroes is counted.
        """
        span, seen = self.prompt.spans[row], self.keys.shape[2]
        first = seen - query.shape[2]
        start, stop = max(rows.start, first), min(rows.stop, seen)
        if start >= stop:
            return None
        end = stop
        if visible is not None:
            end = min(span.stop, seen)
            visible = visible[start - first : stop - first, span.start : end]
        queries = query[row, :, start - first : stop - first]
        sums, zeroed = attention_sums(queries, self.keys[row, :, span.start : end], scaling, threshold, visible)
        if zeroed is not None:
            self.zeroed[row] += zeroed
            self.visible[row] += visible_pairs(stop - start, end - span.start, visible) * query.shape[1]
        return sums

    @torch.no_grad()
    def finish(self) -> None:
        """Turn the sums into scores, once the whole prompt has been observed."""
        for row, span in enumerate(self.prompt.spans):
            vision = self.prompt.vision_mask[row, span.start : span.stop].to(self.keys.device)
            self.scores[row] = self.recipe.score.importance(self.scores[row], vision)

    def sparsity(self, zeroed: Sequence[int], visible: Sequence[int]) -> list[float]:
        """Sparsity of each sequence's post-vision rows, from :attr:`zeroed` and :attr:`visible`; 0 where not measured.

        VL-Cache, arXiv 2410.23317, section 4.1.

        Raises:
            ValueError: the attention holds NaN: the largest weight of a row of numbers always survives.
        """
        if any(count == every > 0 for count, every in zip(zeroed, visible, strict=True)):
            raise ValueError(f"The attention holds NaN, in {self.keys.dtype}: try a dtype of a wider range.")
        return [count / max(every, 1) for count, every in zip(zeroed, visible, strict=True)]

    def compact(self, shares: Sequence[float]) -> Entries:
        """The entries that stay when ``shares[b]`` of each sequence's prompt may; at least one does."""
        spans, reduce = self.prompt.spans, self.recipe.reduce
        kept = [min(max(1, round(share * span.length)), span.length) for share, span in zip(shares, spans, strict=True)]
        entries = Entries.allocate(kept, self.keys, self.values)
        for row, span in enumerate(spans):
            valid = slice(span.start, span.stop)
            positions = reduce.select(self.scores[row], kept[row])
            keys, values = reduce.apply(self.keys[row, :, valid], self.values[row, :, valid], positions)
            entries.fill(row, keys, values, positions + span.start)
        length, seen = self.prompt.length, self.keys.shape[2]
        if seen > length:
            # Assisted generation brings its first candidates together with the prompt.
            entries.append(self.keys[:, :, length:], self.values[:, :, length:], length)
        return entries


def _alone(states: Tensor) -> Tensor:
    """Keys or values without what they were computed together with: fused projections would be held as a whole."""
    states = states.detach()
    return states.clone() if states.untyped_storage().nbytes() > states.nbytes else states
