"""Rotary position embeddings (RoPE) of a prompt's tokens, and of the tokens that will follow them."""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

WITHOUT_ROPE = ("cohere2",)
"""Language parts, by ``model_type``, whose layers of full attention have no positions."""


class Rope:
    """RoPE of the newest tokens of some prompts, for all layers of full attention.

    It is linear in cosines and sines, so the average of rotations is the rotation by average cosines and sines.

    Args:
        language: the language part of a model.
        position_ids: ``[B or 1, q]`` of the newest tokens, or ``[3, B, q]`` with multimodal RoPE.
        valid: bool ``[B, q]`` on the CPU, which of the tokens are the prompts' and no padding.
        earlier: RoPE of the prompts' tokens before.

    Attributes:
        last: the largest position of each prompt so far, ``[B]``; the next token's is one more, in every axis.
    """

    def __init__(self, language: Any, position_ids: Tensor, valid: Tensor, earlier: "Rope | None") -> None:
        # A copy: modules with dynamic frequencies remember the positions that they are called with.
        self._rotary: Any = copy.deepcopy(getattr(language, "rotary_emb", None))
        self._position_ids = position_ids
        of_prompt = position_ids.masked_fill(~valid.to(position_ids.device, non_blocking=True), -1).amax(-1)
        last = of_prompt if of_prompt.ndim == 1 else of_prompt.amax(0)
        self.last: Tensor = last if earlier is None else torch.maximum(last, earlier.last)

    @cached_property
    def newest(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the newest tokens, float32 ``[B or 1, q, R]``."""
        return self._rotate(self._position_ids)

    def _rotate(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 ``[B, n, R]``."""
        options = {"layer_type": "full_attention"} if "layer_type" in _parameters(self._rotary) else {}
        like = torch.empty(0, device=position_ids.device)
        cos, sin = self._rotary(like, position_ids, **options)
        return cos, sin

    def ahead(self, sequence: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[1, 1, R]``, averaged over the ``count`` tokens that follow a prompt."""
        positions = self.last[sequence] + torch.arange(1, count + 1, device=self.last.device)
        cos, sin = self._rotate(positions[None])
        return cos.mean(1, keepdim=True), sin.mean(1, keepdim=True)

    def of(self, module: Any) -> "Rotation":
        """How an attention module rotates its queries and keys.

        Raises:
            ValueError: the language part has no ``rotary_emb`` or the module's file no ``apply_rotary_pos_emb``, as
                transformers calls them.
        """
        if module.config.model_type in WITHOUT_ROPE:
            return Rotation(self, None)
        apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if apply is None or self._rotary is None:
            raise _without_rope(module)
        return Rotation(self, apply)


@dataclass(frozen=True)
class Rotation:
    """RoPE in one layer.

    Args:
        rope: cosines and sines.
        apply: rotates queries and keys ``[B, H, n, D]`` by them; None in a layer without positions.
    """

    rope: Rope
    apply: Callable[..., tuple[Tensor, Tensor]] | None

    def undo(self, query: Tensor, sequence: int, newest: slice) -> Tensor:
        """Queries before RoPE, float32 ``[H, r, D]``, of ``query`` ``[H, r, D]``: the ``newest`` of a sequence."""
        batch = min(sequence, len(self.rope.newest[0]) - 1)
        cos, sin = (each[batch : batch + 1, newest].to(query.device) for each in self.rope.newest)
        # Some models scale cosines and sines.
        scale = cos**2 + sin**2
        return self._by(query, cos / scale, -sin / scale)

    def ahead(self, states: Tensor, sequence: int, count: int) -> Tensor:
        """States ``[H, n, D]`` rotated to the ``count`` positions after a sequence's prompt, averaged, float32."""
        return self._by(states, *(each.to(states.device) for each in self.rope.ahead(sequence, count)))

    def _by(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """States ``[H, n, D]`` rotated, float32."""
        states = states.float()
        return states if self.apply is None else self.apply(states[None], states[None, :1], cos, sin)[0][0]


def rotary_positions(position_ids: Tensor | None, first: int, count: int, device: torch.device) -> Tensor:
    """Positions as RoPE takes them, ``[B or 1, q]`` or ``[3, B, q]``, of what a language part is given.

    That may be nothing, where it counts the ``count`` tokens from ``first`` on itself, or ``[4, B, q]``, where
    transformers puts text positions in front of the three axes.
    """
    if position_ids is None:
        return torch.arange(first, first + count, device=device)[None]
    return position_ids[1:] if position_ids.ndim == 3 and len(position_ids) == 4 else position_ids


def newest_valid(valid: Tensor, first: int, count: int) -> Tensor:
    """Which of ``count`` tokens from ``first`` on are the prompts', bool ``[B, count]`` of their ``[B, T]``."""
    own = valid[:, first : first + count]
    return functional.pad(own, (0, count - own.shape[1]))


def _parameters(module: Any) -> Any:
    return inspect.signature(module.forward).parameters


def _without_rope(module: Any) -> ValueError:
    return ValueError(
        f"{type(module).__name__} does not rotate queries by RoPE as transformers' models do, which this score needs: "
        "take another score."
    )
