"""Memory, bandwidth and clocks of the machine."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Size of the timed copy, far larger than the processor's caches."""

COPIES = 8


def describe(device: torch.device) -> str:
    """The name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def released_memory(device: torch.device) -> Iterator[None]:
    """Release unused GPU memory to another process; reserve it again afterwards, before anything is timed."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        # One block, which torch's allocator keeps and splits; if that fails, less memory is reserved.
        with suppress(torch.OutOfMemoryError):
            torch.empty(before - torch.cuda.memory_reserved(device), dtype=torch.uint8, device=device)


def reset_peak(device: torch.device) -> bool:
    """Reset the peak of memory use; returns whether this machine can measure it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Peak of memory use since :func:`reset_peak`: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _fields(Path("/proc/self/status"))["VmHWM"]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes, the best of :data:`COPIES`."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(COPIES):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


class Stopwatch:
    """Seconds spent in parts of a run, by the device's clock, without synchronization."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the block."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def seconds(self) -> float:
        """Total time so far."""
        synchronize(self.device)
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3


def _fields(path: Path) -> dict[str, int]:
    """Bytes by name from a kernel file with lines such as ``VmHWM:  10 kB``."""
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}
