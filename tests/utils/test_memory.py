import os

import torch

from sparsight.utils.memory import available_bytes


def test_free_memory_is_less_than_the_machines():
    assert 2**20 < available_bytes(torch.device("cpu")) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
