"""What the language part of a model is given for its tokens, kept so that it can process some of them again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LanguageInputs:
    """What the language part was given for consecutive tokens.

    Args:
        language: the language part.
        embeddings: ``[B, T, E]``.
        positions: ``[axes, B, T]``, with three axes where RoPE is multimodal, otherwise one.
        added: what some models add to the hidden states after each of their first layers, ``[B, T, E]``, 0 for text.
        images: bool ``[B, T]``, where they add it.
    """

    language: PreTrainedModel
    embeddings: Tensor
    positions: Tensor
    added: tuple[Tensor, ...]
    images: Tensor | None

    @staticmethod
    def of(language: PreTrainedModel, arguments: Mapping[str, Any], positions: Tensor) -> "LanguageInputs":
        """From the arguments of one forward pass and the positions ``[B or 1, q]`` or ``[3, B, q]`` of its tokens."""
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            embeddings = language.get_input_embeddings()(arguments["input_ids"])
        images, added = arguments.get("visual_pos_masks"), []
        for states in arguments.get("deepstack_visual_embeds") or ():
            added.append(torch.zeros_like(embeddings))
            added[-1][images] = states.to(embeddings)
        positions = positions if positions.ndim == 3 else positions[None]
        positions = positions.expand(-1, len(embeddings), -1)
        return LanguageInputs(language, embeddings, positions, tuple(added), images if added else None)

    @staticmethod
    def joined(parts: Sequence["LanguageInputs"]) -> "LanguageInputs":
        """The tokens of consecutive parts, on the device of the last one."""
        depth, device = max(len(part.added) for part in parts), parts[-1].embeddings.device
        parts = [part.padded(depth).to(device) for part in parts]
        images = [part.images for part in parts if part.images is not None]
        # Text may come with one position for all axes.
        axes = max(len(part.positions) for part in parts)
        return LanguageInputs(
            parts[-1].language,
            torch.cat([part.embeddings for part in parts], dim=1),
            torch.cat([part.positions.expand(axes, -1, -1) for part in parts], dim=2),
            tuple(torch.cat(states, dim=1) for states in zip(*(part.added for part in parts), strict=True)),
            torch.cat(images, dim=1) if images else None,
        )

    def padded(self, depth: int) -> "LanguageInputs":
        """The same with ``depth`` additions: those of a part without images are 0."""
        if len(self.added) == depth:
            return self
        nothing = torch.zeros(self.embeddings.shape[:2], dtype=torch.bool, device=self.embeddings.device)
        added = (torch.zeros_like(self.embeddings),) * depth
        return LanguageInputs(self.language, self.embeddings, self.positions, added, nothing)

    def to(self, device: torch.device | str) -> "LanguageInputs":
        """The same on another device."""
        return self._changed(lambda states: states.to(device), lambda positions: positions.to(device))

    def select(self, sequences: Tensor) -> "LanguageInputs":
        """The sequences at these indices."""
        index = sequences.to(self.embeddings.device)
        return self._changed(
            lambda states: states.index_select(0, index), lambda positions: positions.index_select(1, index)
        )

    def reordered(self, order: Tensor) -> "LanguageInputs":
        """The tokens of each sequence in the order ``[B, T]``, which may leave some out."""
        order = order.to(self.embeddings.device)
        sequences = torch.arange(len(order), device=order.device)[:, None]
        return self._changed(lambda states: states[sequences, order], lambda positions: positions[:, sequences, order])

    def _changed(self, states: Callable[[Tensor], Tensor], positions: Callable[[Tensor], Tensor]) -> "LanguageInputs":
        """The same with every tensor changed, the positions by a function of their own."""
        added = tuple(map(states, self.added))
        images = None if self.images is None else states(self.images)
        return LanguageInputs(self.language, states(self.embeddings), positions(self.positions), added, images)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the language part for these tokens."""
        arguments: dict[str, Any] = {
            "inputs_embeds": self.embeddings,
            "position_ids": self.positions[0] if len(self.positions) == 1 else self.positions,
        }
        if self.images is not None:
            arguments["visual_pos_masks"] = self.images
            arguments["deepstack_visual_embeds"] = [states[self.images] for states in self.added]
        return arguments

    def repeat(self, sequence: int, tokens: slice, ids: Sequence[int], first: Tensor) -> dict[str, Any]:
        """Arguments for an instruction from position ``first`` on and then some tokens of a sequence."""
        indices = torch.arange(tokens.start, tokens.stop)[None]
        own = self.select(torch.tensor([sequence])).reordered(indices)
        instruction = torch.tensor([ids], dtype=torch.long, device=self.embeddings.device)
        embeddings = self.language.get_input_embeddings()(instruction).to(own.embeddings)
        count = len(ids)
        before = torch.arange(count, device=self.positions.device).expand(len(self.positions), 1, -1) + first
        # What is repeated moves as one, so that the tokens of an image keep their distances in every axis.
        moved = own.positions - own.positions.amin() + first + count
        lead = LanguageInputs(self.language, embeddings, before, (), None)
        return LanguageInputs.joined([lead, replace(own, positions=moved)]).arguments()
