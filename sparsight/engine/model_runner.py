"""Decode steps that are captured or compiled: a CUDA graph on a GPU, torch.compile on a CPU."""

from collections.abc import Callable
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def static_capacity(model: PreTrainedModel, tokens: int, *, compile: bool = False) -> int | None:
    """``max_new_tokens`` of a cache: ``tokens`` where decode steps are captured or compiled, otherwise None.

    Raises:
        ValueError: there is no C++ compiler to compile with.
    """
    if model.device.type == "cpu":
        if compile:
            _find_compiler()
        return tokens if compile else None
    return tokens if model.device.type == "cuda" and not is_spread(model) else None


def is_spread(model: PreTrainedModel) -> bool:
    """Whether a model's layers are on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def decode_step(model: PreTrainedModel) -> Callable[..., Any]:
    """A function that runs a model on one new token of every sequence: a CUDA graph on a GPU, compiled on a CPU."""
    return ModelRunner(model) if model.device.type == "cuda" else partial(compiled_step, model)


def compiled_step(model: PreTrainedModel, **inputs: Any) -> Any:
    """``model(**inputs)`` for one new token of every sequence, by torch.compile for a CPU."""
    from torch._inductor import config as weights
    from torch.fx.experimental import _config as shapes

    # Frozen weights are constants that oneDNN can pack; sizes that are equal by chance may differ later.
    with weights.patch(freezing=True), shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # defined at run time
        return _compiled()(model, _without_mask(inputs))


def _find_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "Compiling decode steps needs a C++ compiler: install g++, name one in CXX, or do not compile."
        ) from error


@once
def _compiled() -> Callable[..., Any]:
    return torch.compile(lambda model, inputs: model(**inputs), dynamic=True)


def _without_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a decode step with a mask that is ignored: the cache knows which slots are occupied.

    A real mask would grow with every token. Without a mask the model builds one, unless it is given one of four
    dimensions.
    """
    tokens = inputs["input_ids"]
    return inputs | {"attention_mask": tokens.new_ones(len(tokens), 1, 1, 1, dtype=torch.bool)}


class ModelRunner:
    """Runs a model on one new token of every sequence: the second call captures a CUDA graph, later calls replay it.

    The first call is a warm-up: libraries initialise and kernels compile, which cannot be captured. The next call
    overwrites the returned tensors.

    Args:
        model: the model of a :class:`CompressedCache` with ``max_new_tokens``, whose storage is static.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._warm = False
        self._replay: Callable[[], None] | None = None

    def __call__(self, **inputs: Any) -> Any:
        """``model(**inputs)``, for ``inputs`` with the same names and shapes in every call."""
        inputs = _without_mask(inputs)
        if not self._warm:
            self._warm = True
            return self.model(**inputs)
        tensors = {name: each for name, each in inputs.items() if isinstance(each, Tensor)}
        if self._replay is None:
            self._inputs = {name: each.clone() for name, each in tensors.items()}
            self._replay, self._output = capture(partial(self.model, **(inputs | self._inputs)))
        for name, each in tensors.items():
            self._inputs[name].copy_(each)
        self._replay()
        return self._output


def capture(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture a step in a CUDA graph without running it: a function that replays it, and the output it writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output
