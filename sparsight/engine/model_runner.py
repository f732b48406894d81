"""Generation with captured decode steps: a CUDA graph on a GPU, a compiled step on a CPU."""

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
    """Generate with a compressed cache; on a GPU the decode step is captured once in a CUDA graph and replayed.

    The tokens are those of ``model.generate(**inputs, past_key_values=CompressedCache(model, recipe, inputs), ...)``::

        tokens = sparsight.generate(model, inputs, VLCache(budget=0.1), max_new_tokens=100)

    Models with sliding-window or linear attention layers, models spread over several devices, and methods that recall
    entries decode without one.

    Args:
        model: an unmodified transformers model.
        inputs: what the processor returned for the prompts.
        recipe: the method and its numbers.
        max_new_tokens: the longest answer.
        compile: on a CPU, compile the decode step, once per batch size, with weights packed for products with few rows.
            This takes minutes for billions of weights and keeps them in memory twice until the process ends, which
            pays off over many answers. It needs a C++ compiler.
        options: further arguments of ``model.generate``.

    Returns:
        What ``model.generate`` returns: token ids ``[B, T + n]``, prompts included. With
        ``return_dict_in_generate=True`` its ``past_key_values`` is the cache, whose ``report()`` says what was held.

    Raises:
        ValueError: the cache or ``model.generate`` refuses an argument, a C++ compiler is missing, or the options ask
            for beams or an assistant: give ``model.generate`` a :class:`CompressedCache` for those.
    """
    if (options.get("num_beams") or 1) > 1 or options.get("assistant_model") is not None:
        raise _one_token_at_a_time()
    cache = CompressedCache(model, recipe, inputs, static_capacity(model, max_new_tokens, compile=compile))
    options |= capture_options(cache, options.get("streamer"))
    answer: Any = model.generate
    return answer(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, **options)


def static_capacity(model: PreTrainedModel, tokens: int, *, compile: bool = False) -> int | None:
    """``max_new_tokens`` of a cache: ``tokens`` where decode steps are captured or compiled, otherwise None.

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
    """Arguments of ``model.generate`` that capture a cache's decode steps, if they can be captured."""
    if not (isinstance(cache, CompressedCache) and cache.is_compileable):
        return {}
    # transformers does not pass a streamer on to a custom function.
    return {"custom_generate": partial(_sample, streamer=streamer)}


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


def _sample(
    model: Any, input_ids: Tensor, *, generation_config: GenerationConfig, streamer: Any = None, **arguments: Any
) -> Any:
    """The loop of ``model.generate`` with our decode step where it would call a compiled model."""
    if generation_config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise _one_token_at_a_time()

    def prefill(ids: Tensor, config: GenerationConfig, *rest: Any, **more: Any) -> Any:
        # transformers would compile the chunks of a prompt.
        return model._prefill(ids, AttributeOverride(config, disable_compile=True), *rest, **more)

    # A replay overwrites its earlier output, of which transformers copies only the logits.
    kept = generation_config.output_hidden_states or generation_config.output_attentions
    step = model.__call__ if kept else decode_step(model)
    changed: dict[str, Any] = {"get_compiled_call": lambda config: step, "_prefill": prefill}
    if model.device.type == "cpu":
        changed["_valid_auto_compile_criteria"] = lambda *_: True
    stepping = AttributeOverride(model, **changed)
    return type(model)._sample(stepping, input_ids, generation_config=generation_config, streamer=streamer, **arguments)


def _one_token_at_a_time() -> ValueError:
    return ValueError(
        "sparsight.generate searches greedily or samples: for beams and assistants give model.generate(...) a "
        "CompressedCache."
    )
