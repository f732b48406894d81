"""Why methods keep or lose accuracy: where a model's attention goes, layer by layer, as the papers' figures show it.

For each prompt the model answers with its full cache; what it attended to while decoding is what every score tries to
foresee.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsight.compression import VisualHeads
from sparsight.compression.recipe import Recipe
from sparsight.compression.reduce import top_positions
from sparsight.compression.statistics import attention_sums, visible_pairs
from sparsight.eval.intervals import interval
from sparsight.eval.prefill_snapshot import PrefillSnapshot, States
from sparsight.methods import RECIPES, recipe

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of the prompt for which a score's choice is judged."""

Findings = dict[str, dict[str, NDArray[np.float64]]]
"""Statistic, then what it is of, then figures by layer ``[L]``, or by layer and fraction ``[L, F]``."""


@torch.inference_mode()
def analyze(
    model: Any, inputs: Mapping[str, Any], budget: float = 0.1, threshold: float = 0.01, max_new_tokens: int = 32
) -> Findings:
    """The statistics of one prompt.

    - ``sparsity`` of ``prefill``, of its ``post-vision`` queries, and of ``decoding``: share of the visible attention
      weights that are below ``threshold`` times the largest of their row (VL-Cache, arXiv 2410.23317, equation 1).
    - ``attention`` that decoding pays to ``vision`` and ``text`` of the prompt and to the ``answer`` so far, 1 in all.
    - ``hit_rate`` of each score: of the ``k`` positions with the highest scores, the share that is among the ``k`` to
      which decoding pays most attention, ``k`` a fraction of the prompt in :data:`FRACTIONS`, a mean over KV heads.
    - ``covered`` by each score: share of the attention that decoding pays to the prompt which those ``k`` positions
      get; ``best possible`` is that of the ``k`` to which it pays most.
    - ``kept`` by each allocation: share of the prompt's entries that each layer keeps.

    Args:
        model: an unmodified transformers model.
        inputs: what the processor returned for one prompt, on the model's device.
        budget: at which allocations share out.
        threshold: ``p`` of the threshold filter.
        max_new_tokens: longest answer.

    Raises:
        ValueError: there are several prompts, or the model cannot be used with a compressed cache.
    """
    if inputs["input_ids"].shape[0] != 1:
        raise ValueError(f"Analyze one prompt at a time, not {inputs['input_ids'].shape[0]}.")
    prompt = PrefillSnapshot(model, inputs)
    length = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)[:, length:]
    # The last token is never asked with, unless it is the only one.
    whole = PrefillSnapshot(model, followed(inputs, answer[:, : max(1, answer.shape[1] - 1)]))
    span, vision = prompt.prompt.spans[0], prompt.prompt.vision_mask[0].to(model.device)
    sparsity, attention, paid = [], [], []
    for states in whole.states:
        sums, decoding = _paid(states, range(length, states.query.shape[2]), threshold)
        _, every = _paid(states, range(span.start, length), threshold)
        _, post_vision = _paid(states, range(span.post_vision, length), threshold)
        sparsity.append((every, post_vision, decoding))
        share = sums.mean(0) / sums.mean(0).sum()
        in_prompt = share[:length]
        attention.append([in_prompt[vision].sum(), in_prompt[~vision].sum(), share[length:].sum()])
        paid.append(sums[:, :length])
    return {
        "sparsity": _columns(("prefill", "post-vision", "decoding"), sparsity),
        "attention": _columns(("vision", "text", "answer"), attention),
        **foreseen(scores(prompt), paid),
        "kept": {
            title(chosen.allocate): np.array(prompt.cache(chosen).report().kept_per_layer()) / span.length
            for chosen in _different("allocate", budget)
        },
    }


def scores(prompt: PrefillSnapshot) -> dict[str, list[Tensor]]:
    """What each score of the known methods says of a prompt, ``[H_kv, T]`` a layer."""
    found = {}
    for chosen in _different("score", 1.0):
        layers = prompt.observe(chosen)
        for layer in layers:
            layer.finish()
        found[title(chosen.score)] = [layer.scores[0] for layer in layers]
    return found


def foreseen(scores: Mapping[str, Sequence[Tensor]], paid: Sequence[Tensor]) -> Findings:
    """``hit_rate`` and ``covered`` of scores, from the attention that decoding pays, both ``[H_kv, T]`` a layer."""
    hits: dict[str, Any] = {}
    covered: dict[str, Any] = {}
    for name, layers in {**scores, "best possible": paid}.items():
        pairs = [[_foreseen(*layer, fraction) for fraction in FRACTIONS] for layer in zip(layers, paid, strict=True)]
        found = np.array(pairs, dtype=np.float64)
        hits[name], covered[name] = found[..., 0], found[..., 1]
    del hits["best possible"]
    return {"hit_rate": hits, "covered": covered}


def _foreseen(score: Tensor, paid: Tensor, fraction: float) -> tuple[float, float]:
    """Hit rate and covered attention of one layer's score at one fraction."""
    count = max(1, round(fraction * paid.shape[1]))
    nowhere = torch.zeros(paid.shape[1], dtype=torch.bool)
    best = (top_positions(each, count, nowhere, per_head=True) for each in (score, paid))
    chosen, wanted = (torch.zeros_like(paid).scatter(1, positions, 1.0) for positions in best)
    return float((chosen * wanted).sum(1).mean() / count), float((chosen * paid).sum() / paid.sum())


def _paid(states: States, rows: range, threshold: float) -> tuple[Tensor, float]:
    """Attention sums ``[H_kv, S]`` of consecutive rows, up to the last one's position, and their sparsity."""
    query, key = states.query[0, :, rows.start : rows.stop], states.key[0, :, : rows.stop]
    seen = None if states.visible is None else states.visible[0, 0, rows.start : rows.stop, : rows.stop]
    sums, zeroed = attention_sums(query, key, states.scaling, threshold, seen)
    assert zeroed is not None
    return sums, float(zeroed) / float(query.shape[0] * visible_pairs(len(rows), rows.stop, seen))


def followed(inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """Inputs whose prompt is followed by text, ``[B, n]``."""
    shape = inputs["input_ids"].shape
    more = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    return {
        name: torch.cat([value, more.get(name, torch.zeros_like(answer)).to(value.dtype)], dim=1)
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for name, value in inputs.items()
    }


def _different(role: str, budget: float) -> list[Recipe]:
    """The methods that compress, each part of a role once; without those that need to be calibrated to the model."""
    first: dict[Any, Recipe] = {}
    for name in RECIPES:
        if name == "full":
            continue
        chosen = recipe(name, budget=budget)
        if not isinstance(chosen.allocate, VisualHeads):
            first.setdefault(getattr(chosen, role), chosen)
    return list(first.values())


def title(part: Any) -> str:
    """A part's kind, and its numbers that are not the usual ones."""
    numbers = {
        field.name: getattr(part, field.name)
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    }
    return ", ".join([part.kind, *(f"{name} {value}" for name, value in numbers.items())])


def _columns(names: Sequence[str], rows: Iterable[Iterable[Any]]) -> dict[str, NDArray[np.float64]]:
    """Columns of a table by name."""
    return dict(zip(names, np.array([[float(value) for value in row] for row in rows]).T, strict=True))


def summarise(findings: Sequence[Findings]) -> dict[str, Any]:
    """Means over prompts with their 95 % intervals, as plain data."""
    return {
        statistic: {name: _summary(np.stack([each[statistic][name] for each in findings])) for name in named}
        for statistic, named in findings[0].items()
    }


def _summary(values: NDArray[np.float64]) -> dict[str, Any]:
    """Mean and interval over the first axis."""
    flat = values.reshape(len(values), -1)
    bounds = [interval(column, np.ones(len(column))) for column in flat.T]
    shape = values.shape[1:]
    return {
        "mean": values.mean(0).tolist(),
        "low": np.array([low for low, _ in bounds]).reshape(shape).tolist(),
        "high": np.array([high for _, high in bounds]).reshape(shape).tolist(),
    }
