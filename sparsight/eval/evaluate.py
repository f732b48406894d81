"""A run: tasks under recipes, batch by batch, one prefill for all recipes, every figure on disk at once."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import Any

import torch

from sparsight.compression.recipe import Recipe
from sparsight.eval.converse import Conversations, Turn, converse
from sparsight.eval.example_batches import batches, conversations
from sparsight.eval.metrics import anls, divergence, exact_match, rouge_l, same_tokens, surprisal
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.eval.store import Figures, Store
from sparsight.eval.tasks import Task, needed, records
from sparsight.methods import Full
from sparsight.reader.skills import Example

FULL = Full()
"""What every recipe is compared with: nothing is dropped, on the same path as the methods."""


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Args:
        tasks: what is asked.
        recipes: methods at their budgets; the full cache is always measured as well.
        limit: examples of each task.
        seed: of the examples.
        batch: examples that are worked on together.
    """

    tasks: Sequence[Task]
    recipes: Sequence[Recipe]
    limit: int
    seed: int
    batch: int


def run(
    plan: Plan, model: Any, processor: Any, store: Store, on_progress: Callable[[str, int, int], Any] | None = None
) -> None:
    """Measure what the store does not hold yet.

    Args:
        plan: what to measure.
        model: an unmodified transformers model.
        processor: its processor.
        store: where the figures go.
        on_progress: told what is worked on, how many examples of cells are done, and how many there are.
    """
    recipes = [FULL, *plan.recipes]
    total = len(plan.tasks) * len(recipes) * plan.limit
    done = 0
    for task in plan.tasks:
        examples = {number: task.example(plan.seed, number) for number in range(plan.limit)}
        for batch in batches(processor.tokenizer, examples, plan.batch):
            missing = [recipe for recipe in recipes if not _holds(store, task, recipe, batch)]
            done += (len(recipes) - len(missing)) * len(batch)
            if missing:
                chosen = {number: examples[number] for number in batch}
                for recipe in _measure(task, chosen, missing, model, processor, store):
                    done += len(batch)
                    if on_progress is not None:
                        on_progress(f"{task.label} {recipe.name} {recipe.budget:.3g}", done, total)


def _holds(store: Store, task: Task, recipe: Recipe, batch: Sequence[int]) -> bool:
    return store.cell(task.label, recipe.to_json()).keys() >= set(batch)


def _measure(
    task: Task, examples: dict[int, Example], recipes: Sequence[Recipe], model: Any, processor: Any, store: Store
) -> Iterator[Recipe]:
    """Measure a batch under some recipes, one after the other; each is on disk when it is yielded."""
    began = time.perf_counter()
    conversation = conversations(processor, list(examples.values()), model.device, model.dtype)
    recorded = PrefillSnapshot(model, conversation.inputs)
    full = converse(recorded, FULL, conversation)
    ends = end_tokens(model, processor.tokenizer)
    for recipe in recipes:
        turns = full if recipe is FULL else converse(recorded, recipe, conversation)
        figures = judge(list(examples.values()), conversation, turns, full, processor.tokenizer, ends)
        if recipe is FULL:
            for example, got in zip(examples.values(), figures, strict=True):
                got["needed"], got["records"] = needed(example), records(example)
        store.append(
            task.label, recipe.to_json(), dict(zip(examples, figures, strict=True)), time.perf_counter() - began
        )
        yield recipe
        began = time.perf_counter()


def judge(
    examples: Sequence[Example],
    conversation: Conversations,
    turns: Sequence[Turn],
    full: Sequence[Turn],
    tokenizer: Any,
    ends: set[int],
) -> list[Figures]:
    """The figures of each example of a batch: shares are means over its turns, sums are over all of its tokens."""
    sums = {"surprisal": torch.zeros(len(examples)), "divergence": torch.zeros(len(examples))}
    for answer, turn, reference in zip(conversation.answers, turns, full, strict=True):
        sums["surprisal"] = sums["surprisal"] + surprisal(turn.logits, answer).cpu()
        sums["divergence"] = sums["divergence"] + divergence(turn.logits, reference.logits).cpu()
    figures = []
    for row, example in enumerate(examples):
        said = [cut(turn.tokens[row].tolist(), ends) for turn in turns]
        would = [cut(turn.tokens[row].tolist(), ends) for turn in full]
        answers = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
        pairs = [(got, right) for got, (_, right) in zip(answers, example.turns, strict=True)]
        figures.append(
            {
                "answers": answers,
                "exact": fmean(exact_match(*pair) for pair in pairs),
                "anls": fmean(anls(*pair) for pair in pairs),
                "rouge_l": fmean(rouge_l(*pair) for pair in pairs),
                "same_answer": fmean(float(one == other) for one, other in zip(said, would, strict=True)),
                "same_tokens": fmean(same_tokens(one, other) for one, other in zip(said, would, strict=True)),
                "tokens": sum(answer.shape[1] for answer in conversation.answers),
                **{name: values[row].item() for name, values in sums.items()},
            }
        )
    return figures


def cut(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """Tokens before the first that ends a sequence."""
    return list(takewhile(lambda token: token not in ends, tokens))


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer of a model."""
    given = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}


def weights_digest(model: Any) -> str:
    """What tells a model's weights from others: a hash of the beginning of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
