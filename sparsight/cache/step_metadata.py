"""Where the sequences of a batch are: one object for all layers of a device, advanced once a step."""

import torch
from torch import Tensor

UNBOUNDED = 2**62

# Tensors made in inference mode could not be written to outside of it.
writable = torch.inference_mode(False)


class StepMetadata:
    """Positions of the newest tokens, as tensors that a captured decode step updates in place.

    Attributes:
        position: int64 ``[B]``, the position of the newest token of each sequence.
        end: int64 ``[B]``, the first position that does not fit.
        active: int64 ``[B]``, 1 where there is a sequence, 0 where one has left.
        row_positions: int32 ``[N]``, ``position`` of each KV head of each sequence.
        row_seen: float64 ``[N]``, tokens seen by then.
        row_steps: int64 ``[N]``, ``active`` of each KV head of each sequence.
    """

    @writable
    def __init__(self, batch: int, heads: int, seen: int, room: int | None, device: torch.device) -> None:
        self.position = torch.full((batch,), seen - 1, device=device)
        self.end = self.position + (UNBOUNDED if room is None else room + 1)
        self.active = torch.ones_like(self.position)
        self.row_positions = torch.zeros(batch * heads, dtype=torch.int32, device=device)
        self.row_seen = torch.zeros(batch * heads, dtype=torch.float64, device=device)
        self.row_steps = torch.ones(batch * heads, dtype=torch.int64, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What changes with every token."""
        return self.position, self.end, self.active, self.row_positions, self.row_seen, self.row_steps

    @property
    def seen(self) -> Tensor:
        """Tokens seen, of the sequence that has seen most."""
        return self.position.amax() + 1

    def advance(self) -> None:
        """Go on by one token.

        Raises:
            RuntimeError: it does not fit.
        """
        self.position.add_(self.active)
        fits = (self.position < self.end).all()
        torch._assert_async(fits, "There is no room for another token: give CompressedCache a larger max_new_tokens.")
        self.row_positions.view(len(self.position), -1).copy_(self.position[:, None])
        torch.add(self.row_positions, 1, out=self.row_seen)

    def put(self, sequence: int, position: Tensor | int, end: Tensor | int, active: int) -> None:
        """Set where one sequence is."""
        self.position[sequence], self.end[sequence], self.active[sequence] = position, end, active
        self.row_steps.view(len(self.active), -1)[sequence] = active
