"""Decode steps that are recorded once: as a CUDA graph, or compiled for a CPU."""

from collections.abc import Callable, Mapping
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from sparsight.attention.interface import AttributeOverride
from sparsight.cache import CompressedCache
from sparsight.compression.recipe import Recipe


def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    recipe: Recipe,
    *,
    max_new_tokens: int = 100,
    compile: bool = False,
    **options: Any,
) -> Any:
    """Answer through a compressed cache, on a GPU with decode steps that are recorded once and replayed.

    It is ``model.generate(**inputs, past_key_values=CompressedCache(model, recipe, inputs), ...)``, with the same
    tokens::

        tokens = sparsight.generate(model, inputs, VLCache(budget=0.1), max_new_tokens=100)

    Models with layers that are bounded already (a sliding window, linear attention) and models that are spread over
    several devices decode as ever.

    Args:
        model: an unmodified transformers model.
        inputs: what the processor returned for the prompts.
        recipe: the method and its numbers.
        max_new_tokens: the longest answer.
        compile: on a CPU, compile the decode step, once for each batch size, with weights reordered for products with
            few rows. That takes minutes for billions of weights, and their memory a second time for as long as the
            process runs; many answers may be worth it. It needs a C++ compiler.
        options: further arguments of ``model.generate``.

    Returns:
        What ``model.generate`` returns: token ids ``[B, T + n]``, the prompts' included; with
        ``return_dict_in_generate=True`` the cache is its ``past_key_values``, whose ``report()`` tells what was held.

    Raises:
        ValueError: the cache or ``model.generate`` refuse their arguments, there is no C++ compiler to compile with, or
            they ask for beams or an assistant where steps are recorded, which go through ``model.generate`` and a
            :class:`CompressedCache`.
    """
    cache = CompressedCache(model, recipe, inputs, static_capacity(model, max_new_tokens, compile=compile))
    options |= capture_options(cache, options.get("streamer"))
    if "custom_generate" in options and options.get("assistant_model") is not None:
        raise _not_one_by_one()
    answer: Any = model.generate
    return answer(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, **options)


def static_capacity(model: PreTrainedModel, tokens: int, *, compile: bool = False) -> int | None:
    """``max_new_tokens`` of a cache: as many where decode steps are recorded, or on a CPU compiled; None elsewhere.

    Raises:
        ValueError: there is no C++ compiler to compile with.
    """
    if model.device.type == "cpu":
        if compile:
            _find_compiler()
        return tokens if compile else None
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    return tokens if model.device.type == "cuda" and not spread else None


def capture_options(cache: Cache, streamer: Any = None) -> dict[str, Any]:
    """Arguments of ``model.generate`` with which a cache's decode steps are recorded, if they can be."""
    if not (isinstance(cache, CompressedCache) and cache.is_compileable):
        return {}
    # transformers does not hand a streamer on to a function of one's own.
    return {"custom_generate": partial(_sample, streamer=streamer)}


def decode_step(model: PreTrainedModel) -> Callable[..., Any]:
    """A model's pass over one new token of every sequence, recorded as its device does it."""
    return ModelRunner(model) if model.device.type == "cuda" else partial(compiled_step, model)


def compiled_step(model: PreTrainedModel, **inputs: Any) -> Any:
    """What ``model(**inputs)`` returns for one new token of every sequence, as torch.compile makes it for a CPU."""
    from torch._inductor import config as weights
    from torch.fx.experimental import _config as shapes

    # Frozen weights are constants, which oneDNN reorders; sizes that happen to be equal need not stay so.
    with weights.patch(freezing=True), shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # made at run time
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
    """Inputs of a decode step with a mask that is not looked at.

    What can be seen the cache's entries tell. A mask would grow with every token, and without one the model makes its
    own, unless it has as many dimensions as that.
    """
    tokens = inputs["input_ids"]
    return inputs | {"attention_mask": tokens.new_ones(len(tokens), 1, 1, 1, dtype=torch.bool)}


class ModelRunner:
    """A model's pass over one new token of every sequence, recorded the second time and replayed from then on.

    The first time shows the device all that must not happen for the first time while a graph is recorded. What is
    returned is overwritten by the next call.

    Args:
        model: a model that a :class:`CompressedCache` was made for, with ``max_new_tokens``, so that addresses stay.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._warm = False
        self._replay: Callable[[], None] | None = None

    def __call__(self, **inputs: Any) -> Any:
        """What ``model(**inputs)`` returns, where ``inputs`` have the same names and shapes every time."""
        inputs = _without_mask(inputs)
        if not self._warm:
            self._warm = True
            return self.model(**inputs)
        tensors = {name: each for name, each in inputs.items() if isinstance(each, Tensor)}
        if self._replay is None:
            self._inputs = {name: each.clone() for name, each in tensors.items()}
            self._replay, self._output = record(partial(self.model, **(inputs | self._inputs)))
        for name, each in tensors.items():
            self._inputs[name].copy_(each)
        self._replay()
        return self._output


def record(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of a step, which does not run meanwhile: how to run it, and what it will write its results to."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


def _sample(
    model: Any, input_ids: Tensor, *, generation_config: GenerationConfig, streamer: Any = None, **arguments: Any
) -> Any:
    """The loop of ``model.generate`` with a recorded step where it would compile the model, and on a CPU."""
    if generation_config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise _not_one_by_one()

    def prefill(ids: Tensor, config: GenerationConfig, *rest: Any, **more: Any) -> Any:
        # Chunks of a prompt would be compiled otherwise.
        return model._prefill(ids, AttributeOverride(config, disable_compile=True), *rest, **more)

    # A recorded step overwrites what it gave before; of that transformers copies the logits alone.
    kept = generation_config.output_hidden_states or generation_config.output_attentions
    step = model.__call__ if kept else decode_step(model)
    changed: dict[str, Any] = {"get_compiled_call": lambda config: step, "_prefill": prefill}
    if model.device.type == "cpu":
        changed["_valid_auto_compile_criteria"] = lambda *_: True
    stepping = AttributeOverride(model, **changed)
    return type(model)._sample(stepping, input_ids, generation_config=generation_config, streamer=streamer, **arguments)


def _not_one_by_one() -> ValueError:
    return ValueError(
        "sparsight.generate takes the likeliest token or draws one: for beams and assistants give "
        "model.generate(...) a CompressedCache."
    )
