"""Threads of torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses the calling thread alone.

    OpenMP counts the threads that other Python threads have used before. Where all together are more than the cores,
    they sleep between two operators instead of waiting for the next one: a small model needs several times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
