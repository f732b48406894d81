import pytest
import torch

from sparsight.utils.threads import one_thread


def test_torch_uses_one_thread_until_the_end_whatever_happens():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="failed"), one_thread():
            raise ValueError("failed")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
