"""Recall while decoding: the newest query ranks a prompt, and what ranks first takes the place of other entries."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsight.cache.prefill import Prefill
from sparsight.compression import Recall
from sparsight.compression.reduce import Evict, top_mask
from sparsight.compression.score import Grids

FullStates = Callable[[], tuple[Tensor, Tensor]]
"""Returns the keys ``[H_kv, T, D]`` and values ``[H_kv, T, D_v]`` of a full prompt, in host memory."""


class PromptRecall:
    """The full prompt of one sequence in one layer, from which its decode rule fetches entries.

    Args:
        rule: when it does, and how positions are ranked.
        reduce: how the entries held are chosen from the ranking.
        full: returns the full keys and values in host memory.
        keys: the full keys ``[H_kv, T, D]``, on the device of the entries held.
        grids: positions of the images' patches in the sequence.
        first: the position of the sequence's first token.
        answer: the position of the first token after the prompt.
        kept: entries of the prompt that each KV head holds, in its first slots.
        score: the recipe's score of the prompt, ``[H_kv, T]``, which the rule may add to its ranking.
    """

    def __init__(
        self,
        rule: Recall,
        reduce: Evict,
        full: FullStates,
        keys: Tensor,
        grids: Grids,
        first: int,
        answer: int,
        kept: Sequence[int],
        score: Tensor,
    ) -> None:
        self.rule, self.reduce, self.first, self.answer, self.kept = rule, reduce, first, answer, kept
        self._full = full
        self._index = rule.index.build(keys) if rule.index.resident else None
        # Where positions are ranked.
        device = torch.device("cpu") if self._index is None else keys.device
        self.grids = [grid.to(device) for grid in grids]
        always = torch.stack([reduce.always(count, keys.shape[1]) for count in kept]).to(device)
        # Mostly the same in all heads.
        self._always = always[:1].clone() if (always == always[0]).all() else always
        self._prior = (rule.prior * score).to(device, keys.dtype) if rule.prior else None

    def __deepcopy__(self, memo: dict) -> "PromptRecall":
        """The same object, which does not change."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes that are resident for the ranking."""
        if self._index is None:
            return 0
        return sum(each.nbytes for each in (*self._index, self._always, self._prior) if each is not None)

    def is_due(self, position: int) -> bool:
        """Whether the token at ``position`` recalls."""
        return (position - self.answer) % self.rule.every == 0

    def fetch(
        self, query: Tensor, scaling: float | None, storage: tuple[Tensor, Tensor, Tensor], starts: Tensor
    ) -> None:
        """Hold what a token's queries attend to.

        Args:
            query: ``[H, D]``.
            scaling: factor of the logits, ``D ** -0.5`` if None.
            storage: keys ``[slots, D]``, values ``[slots, D_v]`` and positions ``[slots]``, written in place.
            starts: int64 ``[H_kv]``, the first slot of each KV head.
        """
        self._exchange(self.chosen(query, scaling or query.shape[-1] ** -0.5), storage, starts)

    @torch.no_grad()
    def chosen(self, query: Tensor, scaling: float) -> Tensor:
        """The positions that a query ``[H, D]`` has each KV head hold, bool ``[H_kv, T]`` on the CPU."""
        keys, _ = self._full()
        heads, length, _ = keys.shape
        index = self._index or self.rule.index.build(keys)
        query = query.unflatten(0, (heads, -1)).to(index[0].device)
        ranking = self.rule.rank(query, index, length, scaling, self.grids)
        if self._prior is not None:
            ranking = ranking + self._prior
        return top_mask(ranking, self.kept, self._always, per_head=self.reduce.per_head).cpu()

    @torch.no_grad()
    def _exchange(self, chosen: Tensor, storage: tuple[Tensor, Tensor, Tensor], starts: Tensor) -> None:
        """Hold the ``chosen`` positions, bool ``[H_kv, T]``, by writing what is missing over what is not chosen."""
        keys, values, positions = storage
        heads, length = chosen.shape
        counts = torch.tensor(self.kept, device=starts.device)
        slot = torch.arange(max(self.kept), device=starts.device)
        # Row by row; a shorter one has not all of them.
        slots = (starts[:, None] + slot)[slot < counts[:, None]]
        held = positions.index_select(0, slots).cpu().long() - self.first
        held += torch.arange(0, heads * length, length).repeat_interleave(counts.cpu())
        places = slots[~chosen.flatten().index_select(0, held).to(slots.device)]
        # Both are in the order of the heads, and each head lacks as many as it gives up.
        lacking = chosen.flatten().index_fill(0, held, False).view_as(chosen)
        missing = lacking.nonzero()[:, 1]
        by_head = missing.split(lacking.sum(1).tolist())
        device = positions.device
        for own, full in zip((keys, values), self._full(), strict=True):
            # Rows of one head at a time are copied several times as fast.
            fetched = torch.cat([head.index_select(0, rows) for head, rows in zip(full, by_head, strict=True)])
            own.index_copy_(0, places, fetched.to(device))
        positions.index_copy_(0, places, (missing + self.first).int().to(device))


def begin_recall(prefill: Prefill, kept: Sequence[Sequence[int]], full: Sequence[FullStates]) -> list[PromptRecall]:
    """The recall of each sequence of a layer, of whose prompt each KV head kept ``kept[b][h]`` entries."""
    recalls = []
    for sequence, (span, own) in enumerate(zip(prefill.prompt.spans, kept, strict=True)):
        recipe = prefill.recipe_of(sequence)
        # Recipes that recall evict.
        assert isinstance(recipe.decode, Recall)
        assert isinstance(recipe.reduce, Evict)
        keys, _, _ = prefill.entries(sequence)
        grids = prefill.grids(sequence, torch.device("cpu"))
        places, score = (span.start, prefill.prompt.length), prefill.scores[sequence]
        recalls.append(PromptRecall(recipe.decode, recipe.reduce, full[sequence], keys, grids, *places, own, score))
    return recalls
