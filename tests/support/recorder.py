"""What a CUDA graph does, on a CPU: operations are noted with the tensors they use, and done again with the same ones.

Nothing that Python computed while recording is computed again; what a graph cannot hold is refused.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

FORBIDDEN = {
    aten._local_scalar_dense.default: "a value is read on the host",
    aten.is_nonzero.default: "a value is read on the host",
    aten.nonzero.default: "a shape hangs on values",
    aten.masked_select.default: "a shape hangs on values",
    aten.lift_fresh.default: "a tensor is copied from the host",
    aten._assert_async.default: "only the one with a message is used",
}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in FORBIDDEN, f"{function}: {FORBIDDEN[function]}"
        output = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, output))
        return output

    def replay(self):
        for function, args, kwargs, output in self.calls:
            again = function(*args, **kwargs)
            pairs = zip(*map(_tensors, (output, again)), strict=True)
            for recorded, new in pairs:
                if recorded.data_ptr() != new.data_ptr():
                    recorded.copy_(new)


def record(step):
    """As :func:`model_runner.capture`, which does not run the step: here that was the first replay already."""
    recorder = Recorder()
    with recorder:
        output = step()
    replays = iter([lambda: None])
    return lambda: next(replays, recorder.replay)(), output


def _tensors(output):
    """The tensors of an operation's output."""
    several = output if isinstance(output, tuple | list) else [output]
    return [each for each in several if isinstance(each, Tensor)]
