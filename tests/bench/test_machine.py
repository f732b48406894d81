import mmap

import pytest
import torch

from sparsight.bench import machine
from sparsight.bench.machine import Stopwatch

CPU = torch.device("cpu")


def test_the_peak_is_of_what_lived_since_the_reset():
    if not machine.reset_peak(CPU):
        pytest.skip("this kernel does not reset the peak")
    before = machine.peak_bytes(CPU)
    # Not a tensor: an allocator may keep what tensors leave.
    with mmap.mmap(-1, 2**26) as pages:
        pages.write(b"x" * 2**26)
    assert 2**26 <= machine.peak_bytes(CPU) - before < 2**28
    machine.reset_peak(CPU)
    assert machine.peak_bytes(CPU) < before + 2**25


class Clock:
    """A clock that stands still unless it is advanced."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(machine.time, "perf_counter", clock)
    return clock


def test_bandwidth_counts_bytes_read_and_bytes_written(clock, monkeypatch):
    def copy(self, source):
        clock.now += 2.0

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    assert machine.copy_bandwidth(CPU) == 2**16


def test_a_stopwatch_counts_while_it_runs(clock):
    watch = Stopwatch(CPU)
    for seconds in (2.0, 3.0):
        with watch.running():
            clock.now += seconds
        clock.now += 10.0
    assert watch.seconds() == 5
