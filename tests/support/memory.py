"""How many bytes of tensors live at once."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make of ``inputs``, and the most that live at once."""

    def __init__(self, *inputs):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return output

    def count(self, storage):
        if storage.data_ptr() in self.seen:
            return
        address, size = storage.data_ptr(), storage.nbytes()
        self.seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.release, address, size)

    def release(self, address, size):
        self.seen.discard(address)
        self.live -= size
