"""Stage 1, statistics: one layer's keys and values of the prompt, and what its queries say about them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.attention.rope import Rotation
from sparsight.compression import PostVision, TextVision
from sparsight.compression.allocate import LayerStatistics
from sparsight.compression.attention_statistics import attend_and_sum, visible_pairs
from sparsight.compression.recipe import Recipe
from sparsight.compression.score import AttentionSums, NewQueries, PromptStates
from sparsight.models.prompt import Prompt


def fitted(recipe: Recipe, prompt: Prompt, sequence: int) -> Recipe:
    """The recipe for one sequence of a prompt."""
    return recipe.fitted(prompt.spans[sequence].length, prompt.vision_tokens[sequence])


def first_query(recipe: Recipe, prompt: Prompt, sequence: int) -> int:
    """The first position of a sequence whose query a recipe looks at: of earlier tokens, keys and values are enough."""
    span, score = prompt.spans[sequence], fitted(recipe, prompt, sequence).score
    if score.needs_replay:
        return 0
    queries = [score.queries(span)]
    if recipe.allocate.threshold is not None or isinstance(recipe.allocate, TextVision):
        queries.append(PostVision().queries(span))
    return min(each.start for each in queries)


class Prefill:
    """Keys and values of the prompt so far, the attention they received, and the sparsity of post-vision queries.

    Attributes:
        seen: tokens seen, padding included.
        keys, values: ``[B, H_kv, seen, D]``.
        attention: for each sequence, what its score has accumulated so far, until :meth:`finish`.
        post_vision: the same of its post-vision queries, for allocations that use it.
        scores: ``[H_kv, T_b]`` for each sequence, once :meth:`finish` has been called.
        zeroed: how many weights of each sequence's post-vision queries the threshold filter zeroes in all heads, int64.
        visible: how many weights those queries have, int64.
        exact: whether every query attended to all of the prompt before it.
        rotation: RoPE of the newest queries, where the score is one of queries before RoPE.
    """

    exact = True
    rotation: Rotation | None = None

    def __init__(self, recipe: Recipe, prompt: Prompt, keys: Tensor, values: Tensor) -> None:
        self.recipe = recipe
        self.prompt = prompt
        self.seen = keys.shape[2]
        self.keys, self.values = keys.detach(), values.detach()
        heads, device = keys.shape[1], keys.device
        self.attention = [
            self.recipe_of(sequence).score.accumulator(heads, span, device)
            for sequence, span in enumerate(prompt.spans)
        ]
        self.measures_vision = isinstance(recipe.allocate, TextVision)
        self.post_vision = [AttentionSums(heads, span.length, device) for span in prompt.spans if self.measures_vision]
        self.scores: list[Tensor] = []
        self.zeroed = torch.zeros(len(prompt.spans), dtype=torch.int64, device=device)
        self.visible = torch.zeros_like(self.zeroed)

    def recipe_of(self, sequence: int) -> Recipe:
        """The recipe for a sequence."""
        return fitted(self.recipe, self.prompt, sequence)

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of the prompt's next part."""
        self.seen += keys.shape[2]
        self.keys = torch.cat([self.keys, keys.detach()], dim=2)
        self.values = torch.cat([self.values, values.detach()], dim=2)

    @torch.no_grad()
    def observe(self, query: Tensor, scaling: float, visible: Tensor | None = None) -> None:
        """Add the attention of the newest queries ``[B, H, q, D]`` to the statistics.

        ``visible`` ``[B or 1, 1, q, seen]`` says which keys each query attends to, where it is not those before it.
        """
        threshold = self.recipe.allocate.threshold
        for sequence, span in enumerate(self.prompt.spans):
            mask = None if visible is None else visible[min(sequence, len(visible) - 1), 0]
            queries, post_vision = self.recipe_of(sequence).score.queries(span), PostVision().queries(span)
            # Score and sparsity come from one pass where they come from the same queries.
            shared = threshold if queries == post_vision else None
            zeroed = self._accumulate(self.attention[sequence], sequence, queries, query, scaling, shared, mask)
            if threshold is not None and zeroed is None:
                sums = AttentionSums(self.keys.shape[1], span.length, self.keys.device)
                self._accumulate(sums, sequence, post_vision, query, scaling, threshold, mask)
            if self.measures_vision:
                self._accumulate(self.post_vision[sequence], sequence, post_vision, query, scaling, visible=mask)

    @property
    def needs_every_query(self) -> bool:
        """Whether the score sums the attention of all of the prompt's queries, and of nothing after the prompt."""
        every = all(
            self.recipe_of(sequence).score.queries(span) == range(span.start, span.stop)
            for sequence, span in enumerate(self.prompt.spans)
        )
        waits = self.recipe.score.needs_full_prompt or self.measures_vision
        return every and not waits and self.seen <= self.prompt.length

    @torch.no_grad()
    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """:meth:`observe` where :attr:`needs_every_query`, and the queries' causal attention ``[B, q, H, D]``.

        The output of padding is 0.
        """
        threshold = self.recipe.allocate.threshold
        batch, heads, count, _ = query.shape
        output = self.values.new_zeros(batch, count, heads, self.values.shape[-1])
        for sequence, span in enumerate(self.prompt.spans):
            newest, post_vision = (
                self._newest(queries, query) for queries in (range(span.start, span.stop), PostVision().queries(span))
            )
            if newest.start >= newest.stop:
                continue
            seen = slice(span.start, min(span.stop, self.seen))
            keys, values = self.keys[sequence, :, seen], self.values[sequence, :, seen]
            counted = max(post_vision.stop - post_vision.start, 0)
            queries = query[sequence, :, newest]
            attended, sums, zeroed = attend_and_sum(queries, keys, values, scaling, threshold, counted)
            output[sequence, newest] = attended.transpose(0, 1)
            self.attention[sequence].add_sums(sums)
            if zeroed is not None:
                self._count(sequence, zeroed, visible_pairs(counted, keys.shape[1]) * heads)
        return output

    def _accumulate(
        self,
        attention: AttentionSums,
        sequence: int,
        queries: range,
        query: Tensor,
        scaling: float,
        threshold: float | None = None,
        visible: Tensor | None = None,
    ) -> Tensor | None:
        """Add those of a sequence's ``queries`` that are among the newest; weights zeroed, where they are counted."""
        newest = self._newest(queries, query)
        count = newest.stop - newest.start
        if count <= 0:
            return None
        keys, mask, places = self._attended(sequence, queries, newest, visible)
        states = query[sequence, :, newest]
        if self.rotation is not None and attention is self.attention[sequence]:
            states = self.rotation.undo(states, sequence, newest)
        zeroed = attention.add(NewQueries(states, keys, scaling, mask, places), threshold)
        if zeroed is not None:
            self._count(sequence, zeroed, visible_pairs(count, keys.shape[1], mask) * query.shape[1])
        return zeroed

    def _attended(
        self, sequence: int, queries: range, newest: slice, visible: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Keys that some of the newest queries attend to ``[H_kv, n, D]``, the mask where it is not causal, and the
        places of the keys ``[H_kv, n]`` where they are not the sequence's first.
        """
        span = self.prompt.spans[sequence]
        end = min(queries.stop if visible is None else span.stop, self.seen)
        mask = None if visible is None else visible[newest, span.start : end]
        return self.keys[sequence, :, span.start : end], mask, None

    def _count(self, sequence: int, zeroed: Tensor, visible: Tensor | int) -> None:
        """Add to a sequence's counts of weights that the threshold filter zeroes, and of all of its weights."""
        self.zeroed[sequence] += zeroed
        self.visible[sequence] += visible

    def _newest(self, queries: range, query: Tensor) -> slice:
        """Where ``queries`` are among the newest queries ``[B, H, q, D]``."""
        first = self.seen - query.shape[2]
        return slice(max(queries.start - first, 0), max(min(queries.stop - first, query.shape[2]), 0))

    @torch.no_grad()
    def finish(self, earlier: Sequence[list[Tensor]] | None = None) -> None:
        """Turn what was accumulated into scores, once the prompt is complete.

        ``earlier`` is, for each sequence, what the scores of the layers before this one have left; this one adds to it.
        """
        left = earlier or [[] for _ in self.prompt.spans]
        self.scores = [self._score(sequence, own) for sequence, own in enumerate(left)]
        self.attention = []

    def _score(self, sequence: int, earlier: list[Tensor]) -> Tensor:
        span, rotation, device = self.prompt.spans[sequence], self.rotation, self.keys.device
        recipe = self.recipe_of(sequence)
        kept = max(1, round(recipe.budget * span.length))
        states = PromptStates(
            key=self.keys[sequence, :, span.start : span.stop],
            value=self.values[sequence, :, span.start : span.stop],
            vision=self.vision(sequence).to(device, non_blocking=True),
            grids=self.grids(sequence, device),
            frames=[each.to(device, non_blocking=True) - span.start for each in self._frames(sequence)],
            kept=kept,
            always=recipe.reduce.always(kept, span.length),
            earlier=earlier,
            ahead=None if rotation is None else lambda states, count: rotation.ahead(states, sequence, count),
        )
        return recipe.score.finish(self.attention[sequence], states)

    def importance(self, sequence: int, sums: Tensor) -> Tensor:
        """Score ``[H_kv, T_b]`` from a sequence's attention sums of that shape."""
        vision = self.vision(sequence).to(sums.device, non_blocking=True)
        return self.recipe_of(sequence).score.importance(sums, vision, self.grids(sequence, sums.device))

    def _frames(self, sequence: int) -> tuple[Tensor, ...]:
        return self.prompt.frames[sequence] if self.prompt.frames else ()

    def grids(self, sequence: int, device: torch.device) -> list[Tensor]:
        """Places of the images' patches in a sequence."""
        first = self.prompt.spans[sequence].start
        return [grid.to(device, non_blocking=True) - first for grid in self.prompt.grids[sequence]]

    def statistics(self, sequence: int, sparsity: float) -> LayerStatistics:
        """What one sequence showed, as allocations see it."""
        score, recipe = self.scores[sequence], self.recipe_of(sequence)
        length = score.shape[1]
        always = recipe.reduce.always(max(1, round(recipe.budget * length)), length)
        vision = self.vision(sequence)
        if not self.measures_vision:
            return LayerStatistics(score, sparsity, vision, always)
        received = self.post_vision[sequence].total.mean(0)
        return LayerStatistics(score, sparsity, vision, always, received @ vision.to(received.device, received.dtype))

    def vision(self, sequence: int) -> Tensor:
        """Bool ``[T_b]``, on the CPU: which of a sequence's tokens stand for vision."""
        span = self.prompt.spans[sequence]
        return self.prompt.vision_mask[sequence, span.start : span.stop]

    def entries(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of one sequence, ``[H_kv, n, D]``, and their places in it, ascending, ``[H_kv, n]``."""
        span = self.prompt.spans[sequence]
        valid = slice(span.start, min(span.stop, self.seen))
        keys, values = self.keys[sequence, :, valid], self.values[sequence, :, valid]
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
