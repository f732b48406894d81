"""Statistics of a prefill whose memory is bounded: each layer holds at most a multiple of the budget."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sparsight.cache.prefill import Prefill
from sparsight.compression.recipe import Recipe
from sparsight.compression.score import AttentionSums
from sparsight.models.prompt import Prompt
from sparsight.utils import checks

WINDOW = 32
"""Newest queries that stand in for the score's own until those have come."""

BLOCK_ROWS = 256
"""Queries that attend together, so that no mask is as large as a chunk."""


def check_bound(bound: float, recipe: Recipe) -> None:
    """Raise ValueError unless a prefill of ``recipe`` can be bounded by ``bound``."""
    checks.at_least("prefill_bound", bound, 1)
    if recipe.score.needs_replay:
        raise ValueError(
            f"Score {recipe.score.kind!r} processes the prompt a second time, for which all of it must be held: leave "
            "prefill_bound out, or take another method."
        )
    if recipe.reduce.merges:
        raise ValueError(
            f"Reduction {recipe.reduce.kind!r} merges the entries that go into those that stay, so none may go before "
            "all are planned: leave prefill_bound out, or take a method that evicts."
        )
    if recipe.decode.recalls:
        raise ValueError(
            f"Decode rule {recipe.decode.kind!r} fetches entries back from the full prompt, all of which must be held: "
            "leave prefill_bound out, or take another decode rule."
        )


def check_cuts(recipe: Recipe, *, causal: bool) -> None:
    """Raise ValueError unless a prompt that comes in chunks can be cut between them."""
    waits = recipe.score.needs_full_prompt
    if waits or not causal:
        why = f"score {recipe.score.kind!r} needs all of it" if waits else "the model lets tokens attend to later ones"
        raise ValueError(
            f"A prompt in chunks cannot be cut between them, since {why}: give it in one piece, or leave prefill_bound "
            "out."
        )


def allowance(bound: float, budget: float, length: int) -> int:
    """Entries that each KV head may hold of ``length`` tokens during the prefill."""
    return min(math.ceil(bound * budget * length), length)


class BoundedPrefill(Prefill):
    """A prefill whose layers are cut to ``bound`` times the budget as soon as each has been observed.

    A prompt that comes in one piece is cut in the order of the final selection, and what fewer entries keep is among
    what more keep: the compressed prompt is the same. One that comes in chunks is cut after each by the attention of
    its newest queries, and the chunks that follow attend only to what is left: an approximation.

    Attributes:
        earlier: for each sequence, what the scores of the layers before this one have left.
        remaining: once something has been cut, what :meth:`entries` returns for each sequence; :attr:`keys` and
            :attr:`values` are empty from then on.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompt: Prompt,
        keys: Tensor,
        values: Tensor,
        bound: float,
        earlier: Sequence[list[Tensor]] | None = None,
    ) -> None:
        super().__init__(recipe, prompt, keys, values)
        self.earlier = earlier
        self.remaining: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self.allowances = [
            allowance(bound, self.recipe_of(sequence).budget, span.length) for sequence, span in enumerate(prompt.spans)
        ]

    @torch.no_grad()
    def attend_cut(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Add the prompt's next part and attend to what is left, ``[B, q, H, D]``, once something has been cut.

        The output of padding is 0.
        """
        assert self.remaining is not None
        batch, heads, count, _ = query.shape
        first, self.seen = self.seen, self.seen + count
        output = values.new_zeros(batch, count, heads, values.shape[-1])
        for sequence, span in enumerate(self.prompt.spans):
            new = self._newest(range(span.start, span.stop), query)
            if new.start >= new.stop:
                continue
            places = torch.arange(new.start, new.stop, device=keys.device) + (first - span.start)
            added = keys[sequence, :, new].detach(), values[sequence, :, new].detach(), places.expand(keys.shape[1], -1)
            states = [torch.cat(both, dim=1) for both in zip(self.remaining[sequence], added, strict=True)]
            self.remaining[sequence] = states[0], states[1], states[2]
            output[sequence, new] = attend(query[sequence, :, new], states[0], states[1], scaling).transpose(0, 1)
        self.observe(query, scaling)
        self.cut(query, scaling)
        return output

    def _attended(
        self, sequence: int, queries: range, newest: slice, visible: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """:meth:`Prefill._attended`: what is left, for queries that end with what has been seen."""
        if self.remaining is None:
            return super()._attended(sequence, queries, newest, visible)
        keys, _, places = self.remaining[sequence]
        return keys, None, places

    @torch.no_grad()
    def cut(self, query: Tensor, scaling: float) -> None:
        """Cut every sequence to its allowance, once its newest queries ``[B, H, q, D]`` have been observed."""
        complete = self.seen >= self.prompt.length
        if complete:
            super().finish(self.earlier)
        every = [self.entries(sequence) for sequence in range(len(self.allowances))]
        excess = [states[0].shape[1] > most for states, most in zip(every, self.allowances, strict=True)]
        if not any(excess):
            return
        remaining = []
        for sequence, (keys, values, places) in enumerate(every):
            if excess[sequence]:
                score = self.scores[sequence] if complete else self._provisional(sequence, query, scaling)
                reduce = self.recipe_of(sequence).reduce
                chosen = reduce.select(score.gather(1, places), self.allowances[sequence])
                kept = *reduce.apply(keys, values, chosen), places.gather(1, chosen)
            else:
                # A view would keep the batch in memory.
                kept = keys.clone(), values.clone(), places
            remaining.append(kept)
        self.remaining = remaining
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()
        self.exact &= complete

    def _provisional(self, sequence: int, query: Tensor, scaling: float) -> Tensor:
        """A sequence's score so far, or that of its newest queries while few of the score's own have come."""
        span = self.prompt.spans[sequence]
        end = min(span.stop, self.seen)
        newest = range(max(span.start, end - WINDOW, self.seen - query.shape[2]), end)
        own = self.recipe_of(sequence).score.queries(span)
        attention = self.attention[sequence]
        if own and own.start > newest.start:
            attention = AttentionSums(self.keys.shape[1], span.length, self.keys.device)
            self._accumulate(attention, sequence, newest, query, scaling)
        return self.importance(sequence, attention.total)

    def finish(self, earlier: Sequence[list[Tensor]] | None = None) -> None:
        """Nothing to do: the last :meth:`cut` has made the scores."""

    def entries(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`Prefill.entries`."""
        return super().entries(sequence) if self.remaining is None else self.remaining[sequence]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return super().nbytes + sum(keys.nbytes + values.nbytes for keys, values, _ in self.remaining or [])


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Causal attention ``[H, q, D]`` of the last ``q`` of the ``n`` positions, for keys ``[H_kv, n, D]``."""
    count, length = query.shape[1], keys.shape[1]
    grouped = query.unflatten(0, (len(keys), -1))
    outputs = []
    for first in range(0, count, BLOCK_ROWS):
        # The query heads of a group are rows of one KV head: no key is repeated.
        block = grouped[:, :, first : first + BLOCK_ROWS]
        group, rows = block.shape[1:3]
        seen = length - count + first + rows
        mask = torch.ones(rows, seen, dtype=torch.bool, device=query.device).tril(seen - rows).repeat(group, 1)
        output = functional.scaled_dot_product_attention(
            block.flatten(1, 2)[None], keys[None, :, :seen], values[None, :, :seen], attn_mask=mask, scale=scaling
        )
        outputs.append(output[0].unflatten(1, (group, rows)))
    return torch.cat(outputs, dim=2).flatten(0, 1)
