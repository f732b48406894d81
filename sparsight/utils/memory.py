"""Free memory of a device."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch


def available_bytes(device: torch.device) -> int:
    """Free memory of a device; on a GPU including what torch has reserved and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    # A container may have less than the machine.
    with suppress(OSError, ValueError):
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, allowed - psutil.Process().memory_info().rss)
    return free
