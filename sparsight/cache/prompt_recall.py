"""Recall while decoding: the newest query ranks a prompt, and what ranks first takes the place of other entries."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.cache.prefill import Prefill
from sparsight.compression import Recall
from sparsight.compression.reduce import Reduce
from sparsight.compression.score import Grids


class PromptRecall:
    """The full prompt of one sequence in one layer, from which its decode rule fetches entries.

    Args:
        rule: when it does, and how positions are ranked.
        reduce: how the entries held are chosen from the ranking.
        keys: ``[H_kv, T, D]``, where the full cache is.
        values: ``[H_kv, T, D_v]``.
        grids: positions of the images' patches in the sequence.
        first: the position of the sequence's first token.
        kept: entries of the prompt that each KV head holds, in its first slots.
        device: where the entries held are.
    """

    def __init__(
        self,
        rule: Recall,
        reduce: Reduce,
        keys: Tensor,
        values: Tensor,
        grids: Grids,
        first: int,
        kept: Sequence[int],
        device: torch.device,
    ) -> None:
        self.rule, self.reduce, self.first, self.kept = rule, reduce, first, list(kept)
        self.keys, self.values = keys, values
        self.grids = [grid.to(device if rule.index.resident else keys.device) for grid in grids]
        self.index = rule.index.build(keys.to(device) if rule.index.resident else keys)
        self.tokens = 0

    def __deepcopy__(self, memo: dict) -> "PromptRecall":
        """The prompt does not change, so copies share it."""
        return copy.copy(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the index that are resident."""
        return sum(each.nbytes for each in self.index) if self.rule.index.resident else 0

    def step(
        self, query: Tensor, scaling: float | None, storage: tuple[Tensor, Tensor, Tensor], starts: Tensor
    ) -> None:
        """Count a token, whose queries are ``[H, D]``, and fetch what it attends to if it is time.

        Args:
            query: ``[H, D]``.
            scaling: factor of the logits, ``D ** -0.5`` if None.
            storage: keys ``[slots, D]``, values ``[slots, D_v]`` and positions ``[slots]``, written in place.
            starts: int64 ``[H_kv]``, the first slot of each KV head.
        """
        due = self.tokens % self.rule.every == 0
        self.tokens += 1
        if due:
            self._exchange(self.chosen(query, scaling or query.shape[-1] ** -0.5), storage, starts)

    @torch.no_grad()
    def chosen(self, query: Tensor, scaling: float) -> Tensor:
        """The positions that a query ``[H, D]`` has each KV head hold, bool ``[H_kv, T]`` where the full cache is."""
        heads, length, _ = self.keys.shape
        query = query.unflatten(0, (heads, -1)).to(self.index[0].device)
        ranking = self.rule.rank(query, self.index, length, scaling, self.grids)
        chosen = torch.zeros(heads, length, dtype=torch.bool, device=self.keys.device)
        # Heads that keep the same number are selected together.
        groups = [slice(heads)] if len(set(self.kept)) == 1 else [slice(head, head + 1) for head in range(heads)]
        for group in groups:
            positions = self.reduce.select(ranking[group], self.kept[group.start or 0]).to(chosen.device)
            chosen[group].scatter_(1, positions, True)
        return chosen

    @torch.no_grad()
    def _exchange(self, chosen: Tensor, storage: tuple[Tensor, Tensor, Tensor], starts: Tensor) -> None:
        """Hold the ``chosen`` positions, bool ``[H_kv, T]``, by writing what is missing over what is not chosen."""
        keys, values, positions = storage
        length, counts = chosen.shape[1], torch.tensor(self.kept, device=starts.device)
        slot = torch.arange(max(self.kept), device=starts.device)
        slots = starts[:, None] + slot
        # A shorter head has no entry in some of them.
        inside = slot < counts[:, None]
        held = (positions[torch.where(inside, slots, 0)].long() - self.first).masked_fill(~inside, length)
        held = held.to(chosen.device)
        stays = torch.cat([chosen, chosen.new_ones(len(chosen), 1)], 1)
        resident = torch.zeros_like(stays).scatter_(1, held, True)[:, :length]
        # Both are in the order of the heads, and each head lacks as many as it gives up.
        head, missing = (chosen & ~resident).nonzero(as_tuple=True)
        places = slots[~stays.gather(1, held).to(slots.device)]
        device = positions.device
        keys[places] = self.keys[head, missing].to(device)
        values[places] = self.values[head, missing].to(device)
        positions[places] = (missing + self.first).int().to(device)


def begin_recall(prefill: Prefill, sequence: int, kept: Sequence[int]) -> PromptRecall:
    """The recall of a sequence of which each KV head kept ``kept`` entries."""
    recipe, span = prefill.recipe_of(sequence), prefill.prompt.spans[sequence]
    assert isinstance(recipe.decode, Recall)
    keys, values, _ = prefill.entries(sequence)
    grids = prefill.grids(sequence, keys.device)
    return PromptRecall(recipe.decode, recipe.reduce, keys, values, grids, span.start, kept, keys.device)
