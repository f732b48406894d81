"""One layer during prefill: the whole prompt's keys and values, and what its queries told about them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.cache.dense_store import DenseStore
from sparsight.cache.ragged_store import KVStore, RaggedStore
from sparsight.compression import EliteWindow, PostVision
from sparsight.compression.layer_statistics import KeepRatio, LayerStatistics
from sparsight.compression.recipe import Recipe
from sparsight.compression.statistics import attend_and_sum, attention_sums, visible_pairs
from sparsight.models.prompt import Prompt, Span


class Prefill:
    """Keys and values of the prompt so far, its scores, and the sparsity of its post-vision queries.

    Attributes:
        seen: tokens seen, padding included.
        keys, values: ``[B, H_kv, seen, D]``.
        scores: ``[H_kv, T_b]`` for each sequence: attention sums, until :meth:`finish` makes scores of them.
        zeroed: how many weights of each sequence's post-vision rows the threshold filter zeroes in all heads, int64.
        visible: how many weights those rows have, int64.
        queries, query_sees: for a score that waits for the whole prompt, its queries (scaled, ``[H, r, D]`` of each
            part of the prompt) and which keys each sees, bool ``[r, T_b]``.
        exact: whether every query saw all of the prompt before it.
        cut_short: whether :meth:`compact` found fewer entries than were planned.
    """

    exact = True
    cut_short = False

    def __init__(self, recipe: Recipe, prompt: Prompt, keys: Tensor, values: Tensor) -> None:
        self.recipe = recipe
        self.prompt = prompt
        self.seen = keys.shape[2]
        self.keys, self.values = keys.detach(), values.detach()
        heads, device = keys.shape[1], keys.device
        self.scores = [torch.zeros(heads, span.length, device=device) for span in prompt.spans]
        self.queries: list[list[Tensor]] = [[] for _ in prompt.spans]
        self.query_sees: list[list[Tensor]] = [[] for _ in prompt.spans]
        self.zeroed = torch.zeros(len(prompt.spans), dtype=torch.int64, device=device)
        self.visible = torch.zeros_like(self.zeroed)

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of the prompt's next part."""
        self.seen += keys.shape[2]
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
            if isinstance(score, EliteWindow):
                self._keep(row, score.rows(span), query, scaling, seen)
                together = False
            else:
                # Scores and sparsity come from one pass where they come from the same rows.
                together = score.rows(span) == post_vision
                sums = self._sums(row, score.rows(span), query, scaling, threshold if together else None, seen)
                if sums is not None:
                    self.scores[row][:, : sums.shape[1]] += sums
            if threshold is not None and not together:
                self._sums(row, post_vision, query, scaling, threshold, seen)

    @property
    def needs_every_query(self) -> bool:
        """Whether the score sums the attention of all of the prompt's queries, and of nothing after the prompt."""
        score = self.recipe.score
        every = all(score.rows(span) == range(span.start, span.stop) for span in self.prompt.spans)
        return every and not isinstance(score, EliteWindow) and self.seen <= self.prompt.length

    @torch.no_grad()
    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """:meth:`observe` where :attr:`needs_every_query`, and the queries' causal attention ``[B, q, H, D]``.

        What padding attends to is 0.
        """
        threshold = self.recipe.allocate.threshold
        batch, heads, count, _ = query.shape
        output = self.values.new_zeros(batch, count, heads, self.values.shape[-1])
        for row, span in enumerate(self.prompt.spans):
            newest, post_vision = (
                self._newest(rows, query) for rows in (range(span.start, span.stop), PostVision().rows(span))
            )
            if newest.start >= newest.stop:
                continue
            seen = slice(span.start, min(span.stop, self.seen))
            keys, values = self.keys[row, :, seen], self.values[row, :, seen]
            counted = max(post_vision.stop - post_vision.start, 0)
            attended, sums, zeroed = attend_and_sum(query[row, :, newest], keys, values, scaling, threshold, counted)
            output[row, newest] = attended.transpose(0, 1)
            self.scores[row][:, : sums.shape[1]] += sums
            if zeroed is not None:
                self._count(row, zeroed, visible_pairs(counted, keys.shape[1]) * heads)
        return output

    def _sums(
        self, row: int, rows: range, query: Tensor, scaling: float, threshold: float | None, visible: Tensor | None
    ) -> Tensor | None:
        """:func:`attention_sums` of those of a sequence's ``rows`` that are among the newest queries.

        With a threshold, what it zeroes is counted.
        """
        span, newest = self.prompt.spans[row], self._newest(rows, query)
        count = newest.stop - newest.start
        if count <= 0:
            return None
        end = min(rows.stop if visible is None else span.stop, self.seen)
        if visible is not None:
            visible = visible[newest, span.start : end]
        keys = self.keys[row, :, span.start : end]
        sums, zeroed = attention_sums(query[row, :, newest], keys, scaling, threshold, visible)
        if zeroed is not None:
            self._count(row, zeroed, visible_pairs(count, end - span.start, visible) * query.shape[1])
        return sums

    def _count(self, row: int, zeroed: Tensor, visible: Tensor | int) -> None:
        """Add to a sequence's counts of weights that the threshold filter zeroes, and of all of its weights."""
        self.zeroed[row] += zeroed
        self.visible[row] += visible

    def _keep(self, row: int, rows: range, query: Tensor, scaling: float, visible: Tensor | None) -> None:
        """Keep those of a sequence's ``rows`` that are among the newest queries, and which keys they see."""
        span, newest = self.prompt.spans[row], self._newest(rows, query)
        if visible is None:
            keys = torch.arange(self.seen, device=query.device)
            seen = keys <= keys[-query.shape[2] :][newest, None]
        else:
            seen = visible[newest]
        seen = seen[:, span.start : span.stop]
        self.queries[row].append(query[row, :, newest].float() * scaling)
        self.query_sees[row].append(functional.pad(seen, (0, span.length - seen.shape[1])))

    def _newest(self, rows: range, query: Tensor) -> slice:
        """Where ``rows`` are among the newest queries ``[B, H, q, D]``."""
        first = self.seen - query.shape[2]
        return slice(max(rows.start - first, 0), max(min(rows.stop - first, query.shape[2]), 0))

    @torch.no_grad()
    def finish(self) -> None:
        """Turn the sums into scores, once the whole prompt has been observed."""
        for row, span in enumerate(self.prompt.spans):
            score = self.recipe.score
            if isinstance(score, EliteWindow):
                keys = self.keys[row, :, span.start : span.stop]
                queries, visible = torch.cat(self.queries[row], dim=1), torch.cat(self.query_sees[row])
                vision = self.vision(row).to(keys.device, non_blocking=True)
                self.scores[row] = score.sums(queries, keys, vision, visible)
            self.scores[row] = self.importance(row, self.scores[row])

    def importance(self, row: int, sums: Tensor) -> Tensor:
        """Score ``[H_kv, T_b]`` that a sequence's attention sums of that shape give."""
        vision = self.vision(row).to(sums.device, non_blocking=True)
        first = self.prompt.spans[row].start
        grids = [grid.to(sums.device, non_blocking=True) - first for grid in self.prompt.grids[row]]
        return self.recipe.score.importance(sums, vision, grids)

    def observed(self, row: int, sparsity: float, budget: float) -> LayerStatistics:
        """What one sequence showed, as allocations see it."""
        score = self.scores[row]
        length = score.shape[1]
        always = self.recipe.reduce.always(max(1, round(budget * length)), length)
        return LayerStatistics(score, sparsity, self.vision(row), always)

    def vision(self, row: int) -> Tensor:
        """Bool ``[T]``, on the CPU: which of a sequence's tokens stand for vision."""
        span = self.prompt.spans[row]
        return self.prompt.vision_mask[row, span.start : span.stop]

    def sparsity(self, zeroed: Sequence[int], visible: Sequence[int]) -> list[float]:
        """Sparsity of each sequence's post-vision rows, from :attr:`zeroed` and :attr:`visible`; 0 where not measured.

        VL-Cache, arXiv 2410.23317, section 4.1.

        Raises:
            ValueError: the attention holds NaN: the largest weight of a row of numbers always survives.
        """
        if any(count == every > 0 for count, every in zip(zeroed, visible, strict=True)):
            raise ValueError(f"The attention holds NaN, in {self.keys.dtype}: try a dtype of a wider range.")
        return [count / max(every, 1) for count, every in zip(zeroed, visible, strict=True)]

    def compact(self, shares: Sequence[KeepRatio]) -> KVStore:
        """The entries that stay when ``shares[b]`` of each sequence's prompt may; at least one of a KV head does."""
        rows = list(self._rows(shares))
        planned = [max(1, round(share * span.length)) for share, span, *_ in rows]
        kept = [min(count, keys.shape[1]) for count, (*_, keys, _, _) in zip(planned, rows, strict=True)]
        self.cut_short = kept != planned
        storage = RaggedStore if self.recipe.allocate.head_wise else DenseStore
        entries: KVStore = storage.allocate(kept, self.keys, self.values)
        for row, (_, span, score, keys, values, positions) in enumerate(rows):
            chosen = self.recipe.reduce.select(score.gather(1, positions), kept[row])
            states = self.recipe.reduce.apply(keys, values, chosen)
            entries.fill(row, *states, positions.gather(1, chosen) + span.start)
        length = self.prompt.length
        if self.seen > length:
            # Assisted generation brings its first candidates together with the prompt.
            entries.append(self.keys[:, :, length:], self.values[:, :, length:], length)
        return entries

    def _rows(self, shares: Sequence[KeepRatio]) -> Iterator[tuple[float, Span, Tensor, Tensor, Tensor, Tensor]]:
        """What selection works on, of a sequence or of each of its KV heads.

        KeepRatio, span, score of the whole prompt, and keys, values and positions held.
        """
        for row, (share, span) in enumerate(zip(shares, self.prompt.spans, strict=True)):
            states = (self.scores[row], *self.held(row))
            if isinstance(share, list):
                for head, own_share in enumerate(share):
                    score, keys, values, positions = (state[head, None] for state in states)
                    yield own_share, span, score, keys, values, positions
            else:
                yield share, span, *states

    def held(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of one sequence, ``[H_kv, n, D]``, and where in it they are, ascending, ``[H_kv, n]``."""
        span = self.prompt.spans[row]
        valid = slice(span.start, min(span.stop, self.seen))
        keys, values = self.keys[row, :, valid], self.values[row, :, valid]
        return keys, values, torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all sequences."""
        batch, heads, _, size = self.keys.shape
        return batch * heads * (size + self.values.shape[-1]) * self.keys.element_size()
