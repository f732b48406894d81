"""The tokens of a conversation so far, so that a new turn can process some of them again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsight.cache.language_inputs import LanguageInputs
from sparsight.models.frames import vision_runs
from sparsight.models.prompt import Prompt, locate

TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


class Transcript:
    """What a model was given for all tokens so far, and how they become one longer prompt when a new turn begins.

    Args:
        config: the model's config.
        find: whether :func:`~sparsight.models.prompt.locate` is to find ``grids`` and ``frames`` in a turn.

    Attributes:
        call: arguments of the model's forward pass that is under way.
    """

    def __init__(self, config: Any, find: Mapping[str, bool]) -> None:
        self._config, self._find = config, find
        self._parts: list[LanguageInputs] = []
        self._total = 0
        self._returned: Tensor | None = None
        self.call: Mapping[str, Any] = {}

    def __deepcopy__(self, memo: dict) -> "Transcript":
        """One of its own with the same tokens, which do not change."""
        copied = Transcript(self._config, self._find)
        copied._parts, copied._total = list(self._parts), self._total
        return copied

    def clear(self) -> None:
        """Forget all tokens."""
        self._parts, self._total = [], 0

    def select(self, index: Tensor) -> None:
        """Replace the sequences by those at ``index``."""
        self._parts = [part.select(index) for part in self._parts]

    def add(self, inputs: LanguageInputs, first: int) -> None:
        """Add what the language part is given for the tokens from ``first`` on; those of a prompt go to host memory."""
        # Tokens of an answer can be taken back.
        while self._total > first:
            self._total -= self._parts.pop().embeddings.shape[1]
        self._total += inputs.embeddings.shape[1]
        self._parts.append(inputs.to("cpu") if inputs.embeddings.shape[1] > 1 else inputs)

    def continued(self, prompt: Prompt, count: int, attention_mask: Any) -> Prompt:
        """The prompt of all tokens, of which the last ``count`` are a new turn, with its padding on the left.

        Args:
            prompt: the prompt before this turn.
            count: tokens of the new turn.
            attention_mask: ``[B, S]`` of all tokens, or None if there is no padding.

        Raises:
            ValueError: the mask has another shape, or the turn's inputs are refused as those of a prompt would be.
        """
        inputs = LanguageInputs.joined(self._parts)
        batch, total = inputs.embeddings.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, total)
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, total):
            raise ValueError(f"A new turn needs an attention_mask of all tokens, of shape {[batch, total]}.")
        valid = attention_mask.bool().cpu()
        prompt, order = prompt.continued(valid[:, prompt.length :], self._locate(count))
        self._parts = [inputs.reordered(order)]
        # Where the tokens of the turn are, in the order in which the model gave them.
        self._returned = order.argsort(dim=1)[:, total - count :]
        return prompt

    def _locate(self, count: int) -> Prompt:
        """What the tokens of the new turn are, padding not considered."""
        call, self.call = self.call, {}
        if call.get("input_ids") is None:
            raise ValueError("A new turn needs input_ids.")
        own = {name: call[name][:, -count:] for name in TEXT_INPUTS if isinstance(call.get(name), Tensor)}
        own["attention_mask"] = torch.ones_like(own["input_ids"])
        turn = locate(self._config, {**call, **own}, **self._find)
        if self._find["grids"] and not any(turn.grids):
            # The pixels, if there are any, do not arrive here: an image counts as one line of patches.
            lines = (tuple(run[None] for run in vision_runs(mask)) for mask in turn.vision_mask)
            turn = replace(turn, grids=tuple(lines))
        return turn

    def arguments(self, start: int, device: torch.device) -> dict[str, Any]:
        """Arguments of the language part for all tokens from ``start`` on."""
        assert self._returned is not None
        (inputs,) = self._parts
        self._returned = (self._returned - start).clamp(min=0)
        tokens = torch.arange(start, inputs.embeddings.shape[1]).expand(len(inputs.embeddings), -1)
        return inputs.reordered(tokens).to(device).arguments()

    def restrict(self, output: Any) -> None:
        """Remove from the language part's output the tokens that the model did not ask for."""
        if self._returned is not None:
            states, places = output.last_hidden_state, self._returned.to(output.last_hidden_state.device)
            self._returned = None
            output.last_hidden_state = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
