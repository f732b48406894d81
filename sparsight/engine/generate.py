"""``sparsight.generate``: one call for what ``model.generate`` does with a compressed cache."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from sparsight.attention.interface import AttributeOverride
from sparsight.cache import CompressedCache
from sparsight.cache.layer import CompressedLayer
from sparsight.compression.recipe import Recipe
from sparsight.engine import model_runner
from sparsight.engine.engine import Engine
from sparsight.engine.positions import next_positions
from sparsight.engine.prefilled import next_logits, split
from sparsight.engine.sampling import SamplingParams

ONE_TOKEN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""Modes in which each step generates one token of every sequence."""

ON_THE_ENGINE = {"max_new_tokens", "repetition_penalty", "bos_token_id", "eos_token_id", "pad_token_id"}
WITHOUT_EFFECT = {
    *("max_length", "temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams", "use_cache"),
    *("transformers_version", "_from_model_config"),
}
"""Settings of a ``GenerationConfig``: those of a greedy search on the engine, and those that change nothing in it."""


def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    recipe: Recipe,
    *,
    max_new_tokens: int = 100,
    compile: bool = False,
    **options: Any,
) -> Any:
    """Generate with a compressed cache, the fastest way that the device and the options allow.

    The tokens are those of ``model.generate(**inputs, past_key_values=CompressedCache(model, recipe, inputs), ...)``::

        tokens = sparsight.generate(model, inputs, VLCache(budget=0.1), max_new_tokens=100)

    On a GPU the decode step of greedy search and of sampling is captured in a CUDA graph and replayed. On a CPU greedy
    search runs on the engine, where a sequence that has ended takes no more time. All else is left to
    ``model.generate``: beams, assistants, sampling on a CPU (with torch's random numbers), models with sliding-window
    or linear attention layers, and models spread over several devices.

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
        ValueError: the cache or ``model.generate`` refuses an argument, or a C++ compiler is missing.
        RequestError: an answer has failed on the engine, as for lack of memory.
    """
    config = copy.deepcopy(options.get("generation_config") or model.generation_config)
    others = config.update(max_new_tokens=max_new_tokens, **options)
    mode = config.get_generation_mode(options.get("assistant_model"))
    capacity = model_runner.static_capacity(model, max_new_tokens, compile=compile) if mode in ONE_TOKEN else None
    cache = CompressedCache(model, recipe, inputs, capacity)
    greedy = mode is GenerationMode.GREEDY_SEARCH and not others
    if capacity is None and greedy and _runs_on_engine(model, cache, config):
        return _greedy(model, inputs, cache, config)
    options |= capture_options(cache, options.get("streamer"))
    answer: Any = model.generate
    return answer(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, **options)


def _runs_on_engine(model: PreTrainedModel, cache: CompressedCache, config: GenerationConfig) -> bool:
    """Whether the engine has all that a greedy search is configured with, and a pool for the model's layers."""
    chosen = {name for name, value in config.to_diff_dict().items() if value}
    compressed = all(isinstance(layer, CompressedLayer) for layer in cache.layers)
    return compressed and not model_runner.is_spread(model) and chosen <= ON_THE_ENGINE | WITHOUT_EFFECT


@torch.no_grad()
def _greedy(
    model: PreTrainedModel, inputs: Mapping[str, Any], cache: CompressedCache, config: GenerationConfig
) -> Tensor:
    """Prefill the batch at once, and decode its sequences until each has ended, ``[B, T + n]``."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        repetition_penalty=config.repetition_penalty or 1.0,
        stop_token_ids=[token for token in ends if token is not None],
        ignore_eos=True,
    )
    positions = next_positions(model, inputs)
    prompts = split(cache, inputs, positions, next_logits(model, cache, inputs))
    with Engine(model, None, cache.recipe) as engine:
        handles = [engine.resume(prompt, params) for prompt in prompts]
        answers = [handle.wait()[0].token_ids for handle in handles]
    ids = inputs["input_ids"]
    padding = config.pad_token_id if config.pad_token_id is not None else (params.stop_token_ids or [0])[0]
    tokens = [torch.tensor(answer, device=ids.device) for answer in answers]
    return torch.cat([ids, pad_sequence(tokens, batch_first=True, padding_value=padding)], dim=1)


def capture_options(cache: Cache, streamer: Any = None) -> dict[str, Any]:
    """Arguments of ``model.generate`` that capture a cache's decode steps, if they can be captured."""
    if not (isinstance(cache, CompressedCache) and cache.is_compileable):
        return {}
    # transformers does not pass a streamer on to a custom function.
    return {"custom_generate": partial(_sample, streamer=streamer)}


def _sample(
    model: Any, input_ids: Tensor, *, generation_config: GenerationConfig, streamer: Any = None, **arguments: Any
) -> Any:
    """The loop of ``model.generate`` with our decode step where it would call a compiled model.

    The engine does not capture the steps of a batch, whose sequences come and go.
    """

    def prefill(ids: Tensor, config: GenerationConfig, *rest: Any, **more: Any) -> Any:
        # transformers would compile the chunks of a prompt.
        return model._prefill(ids, AttributeOverride(config, disable_compile=True), *rest, **more)

    # A replay overwrites its earlier output, of which transformers copies only the logits.
    kept = generation_config.output_hidden_states or generation_config.output_attentions
    step = model.__call__ if kept else model_runner.decode_step(model)
    changed: dict[str, Any] = {"get_compiled_call": lambda config: step, "_prefill": prefill}
    if model.device.type == "cpu":
        changed["_valid_auto_compile_criteria"] = lambda *_: True
    stepping = AttributeOverride(model, **changed)
    return type(model)._sample(stepping, input_ids, generation_config=generation_config, streamer=streamer, **arguments)
