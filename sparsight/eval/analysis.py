"""Why methods keep or lose accuracy: where a model's attention goes, by layer, as in the figures of the papers.

The model answers each prompt with its full cache. The attention of its decoding queries is what every score tries to
predict.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsight.cache.plan import finish
from sparsight.compression import VisualHeads
from sparsight.compression.attention_statistics import attention_sums, visible_pairs
from sparsight.compression.recipe import Recipe
from sparsight.compression.reduce import top_positions
from sparsight.eval.prefill_snapshot import PrefillSnapshot, States
from sparsight.eval.significance import bootstrap_interval
from sparsight.methods import RECIPES, recipe

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Fractions of the prompt at which scores are evaluated."""

Statistics = dict[str, dict[str, NDArray[np.float64]]]
"""Values by layer ``[L]``, or by layer and fraction ``[L, F]``, by statistic and name."""


@torch.inference_mode()
def analyze(
    model: Any, inputs: Mapping[str, Any], budget: float = 0.1, threshold: float = 0.01, max_new_tokens: int = 32
) -> Statistics:
    """The statistics of one prompt.

    - ``sparsity`` of ``prefill`` (all queries of the prompt), its ``post-vision`` queries, and ``decoding``: fraction
      of the causally visible attention weights below ``threshold`` times the maximum of their row (VL-Cache, arXiv
      2410.23317, equation 1).
    - ``attention`` of decoding to ``vision`` and ``text`` of the prompt and to the ``answer`` so far; the sum is 1.
    - ``hit_rate`` of each score: the overlap of the ``k`` positions with the highest scores and the ``k`` with the
      highest attention of decoding, as a fraction of ``k``; a mean over KV heads. ``k`` is a fraction of the prompt, in
      :data:`FRACTIONS`.
    - ``covered`` by each score: the fraction of decoding's attention to the prompt that goes to the score's ``k``
      positions. ``best possible`` is that of the ``k`` positions with the highest attention.
    - ``kept`` by each allocation: the fraction of the prompt's entries that each layer keeps.

    Args:
        model: an unmodified transformers model.
        inputs: what the processor returned for one prompt, on the model's device.
        budget: budget of the allocations.
        threshold: ``p`` of the threshold filter.
        max_new_tokens: longest answer.

    Raises:
        ValueError: there are several prompts, or the model cannot be used with a compressed cache.
    """
    if inputs["input_ids"].shape[0] != 1:
        raise ValueError(f"Analyze one prompt at a time, not {inputs['input_ids'].shape[0]}.")
    prompt = PrefillSnapshot(model, inputs)
    length = inputs["input_ids"].shape[1]
    # The full cache is transformers' own: what is analyzed is the model, without a method.
    answer = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)[:, length:]
    # The answer's last token is never a query, unless it is the only one.
    with_answer = PrefillSnapshot(model, append_text(inputs, answer[:, : max(1, answer.shape[1] - 1)]))
    span, vision = prompt.prompt.spans[0], prompt.prompt.vision_mask[0].to(model.device)
    sparsity, attention, received = [], [], []
    for states in with_answer.states:
        sums, decoding = _attention_received(states, range(length, states.query.shape[2]), threshold)
        _, prefill = _attention_received(states, range(span.start, length), threshold)
        _, post_vision = _attention_received(states, range(span.post_vision, length), threshold)
        sparsity.append((prefill, post_vision, decoding))
        share = sums.mean(0) / sums.mean(0).sum()
        in_prompt = share[:length]
        attention.append([in_prompt[vision].sum(), in_prompt[~vision].sum(), share[length:].sum()])
        received.append(sums[:, :length])
    return {
        "sparsity": _columns(("prefill", "post-vision", "decoding"), sparsity),
        "attention": _columns(("vision", "text", "answer"), attention),
        **evaluate_scores(scores(prompt), received),
        "kept": {
            part_name(chosen.allocate): np.array(prompt.cache(chosen).report().kept_per_layer()) / span.length
            for chosen in _distinct("allocate", budget)
        },
    }


def scores(prompt: PrefillSnapshot) -> dict[str, list[Tensor]]:
    """The scores of a prompt by every known method that processes it once, ``[H_kv, T]`` per layer."""
    by_name = {}
    for chosen in _distinct("score", 1.0):
        layers = prompt.observe(chosen)
        finish(layers)
        by_name[part_name(chosen.score)] = [layer.scores[0] for layer in layers]
    return by_name


def evaluate_scores(scores: Mapping[str, Sequence[Tensor]], received: Sequence[Tensor]) -> Statistics:
    """``hit_rate`` and ``covered`` of scores.

    Args:
        scores: ``[H_kv, T]`` per layer, by name.
        received: attention of decoding that each position receives, ``[H_kv, T]`` per layer.
    """
    hits: dict[str, Any] = {}
    covered: dict[str, Any] = {}
    for name, layers in {**scores, "best possible": received}.items():
        pairs = [
            [_hit_rate_and_coverage(*layer, fraction) for fraction in FRACTIONS]
            for layer in zip(layers, received, strict=True)
        ]
        values = np.array(pairs, dtype=np.float64)
        hits[name], covered[name] = values[..., 0], values[..., 1]
    del hits["best possible"]
    return {"hit_rate": hits, "covered": covered}


def _hit_rate_and_coverage(score: Tensor, received: Tensor, fraction: float) -> tuple[float, float]:
    """Hit rate and covered attention of one layer's score at one fraction."""
    count = max(1, round(fraction * received.shape[1]))
    nowhere = torch.zeros(received.shape[1], dtype=torch.bool)
    best = (top_positions(each, count, nowhere, per_head=True) for each in (score, received))
    chosen, wanted = (torch.zeros_like(received).scatter(1, positions, 1.0) for positions in best)
    return float((chosen * wanted).sum(1).mean() / count), float((chosen * received).sum() / received.sum())


def _attention_received(states: States, queries: range, threshold: float) -> tuple[Tensor, float]:
    """Attention ``[H_kv, S]`` of consecutive queries, summed by key up to the last query, and its sparsity."""
    query, key = states.query[0, :, queries.start : queries.stop], states.key[0, :, : queries.stop]
    visible = None if states.visible is None else states.visible[0, 0, queries.start : queries.stop, : queries.stop]
    sums, zeroed = attention_sums(query, key, states.scaling, threshold, visible)
    assert zeroed is not None
    return sums, float(zeroed) / float(query.shape[0] * visible_pairs(len(queries), queries.stop, visible))


def append_text(inputs: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Inputs with text tokens ``[B, n]`` after the prompt."""
    shape = inputs["input_ids"].shape
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {
        name: torch.cat([value, more.get(name, torch.zeros_like(tokens)).to(value.dtype)], dim=1)
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for name, value in inputs.items()
    }


def _distinct(role: str, budget: float) -> list[Recipe]:
    """Known methods with distinct parts of a role, except calibrated ones and those that process a prompt twice."""
    first: dict[Any, Recipe] = {}
    for name in RECIPES:
        if name == "full":
            continue
        chosen = recipe(name, budget=budget)
        if not isinstance(chosen.allocate, VisualHeads) and not chosen.score.needs_replay:
            first.setdefault(getattr(chosen, role), chosen)
    return list(first.values())


def part_name(part: Any) -> str:
    """A part's kind and its parameters that differ from the defaults, in words."""
    changed = {
        field.name: getattr(part, field.name)
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    }
    return ", ".join([part.kind, *(_parameter(name.replace("_", " "), value) for name, value in changed.items())])


def _parameter(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    if dataclasses.is_dataclass(value):
        return f"{name} {part_name(value)}"
    return f"{name} {' x '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _columns(names: Sequence[str], rows: Iterable[Iterable[Any]]) -> dict[str, NDArray[np.float64]]:
    """The columns of a table by name."""
    return dict(zip(names, np.array([[float(value) for value in row] for row in rows]).T, strict=True))


def summarize(prompts: Sequence[Statistics]) -> dict[str, Any]:
    """Means over prompts with their 95 % intervals, as plain data."""
    return {
        statistic: {name: _mean_and_interval(np.stack([each[statistic][name] for each in prompts])) for name in by_name}
        for statistic, by_name in prompts[0].items()
    }


def _mean_and_interval(values: NDArray[np.float64]) -> dict[str, Any]:
    """Mean and interval over the first axis."""
    flat = values.reshape(len(values), -1)
    bounds = [bootstrap_interval(column, np.ones(len(column))) for column in flat.T]
    shape = values.shape[1:]
    return {
        "mean": values.mean(0).tolist(),
        "low": np.array([low for low, _ in bounds]).reshape(shape).tolist(),
        "high": np.array([high for _, high in bounds]).reshape(shape).tolist(),
    }
