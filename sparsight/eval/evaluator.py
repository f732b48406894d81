"""Accuracy of recipes on tasks: one prefill per batch for all recipes, results on disk as soon as they are measured."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from statistics import fmean
from typing import Any

import torch

from sparsight.compression.recipe import Recipe
from sparsight.eval.collate import conversations, group_by_answer_length, text_conversations, tokenizer_of
from sparsight.eval.converse import Conversations, Turn, converse
from sparsight.eval.kvpress_methods import KvpressMethod
from sparsight.eval.metrics import anls, divergence, exact_match, rouge_l, same_tokens, surprisal
from sparsight.eval.passages import TextExample
from sparsight.eval.prefill_snapshot import PrefillSnapshot
from sparsight.eval.result_store import ExampleResult, ResultStore
from sparsight.eval.tasks import Task, answer_patch_share, record_count
from sparsight.methods import Full
from sparsight.models.inputs import check_length
from sparsight.reader.skills import Example

FULL = Full()
"""The reference of every recipe: nothing is dropped, on the same code path as the methods."""

STEP_SECONDS = 30
"""Longest time without a result on disk, as far as batches can be made smaller."""

PACE_EXAMPLES = 4
"""Examples of a task's second batch, from which the time of larger ones is estimated."""

Method = Recipe | KvpressMethod

OnProgress = Callable[[str, int, int], Any]
"""Receives what is being measured, the number of results so far, and their total."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What a run measures.

    Args:
        tasks: tasks to evaluate on.
        recipes: methods at their budgets, on text tasks also kvpress's; the full cache is always measured as well.
        limit: examples per task.
        seed: seed of the examples.
        batch_size: examples per batch.
        passage_as_vision: mark the passages of text tasks as vision tokens, so that a method treats them like an image.
        keep: ``"host"`` for caches that keep the full prompt in host memory, to which a new turn attends.
        host_dtype: as :class:`~sparsight.CompressedCache` takes it.
    """

    tasks: Sequence[Task]
    recipes: Sequence[Method]
    limit: int
    seed: int
    batch_size: int
    passage_as_vision: bool = False
    keep: str | None = None
    host_dtype: str | None = None

    @property
    def all_recipes(self) -> list[Method]:
        """The full cache and the recipes."""
        return [FULL, *self.recipes]

    @property
    def total(self) -> int:
        """Results of a finished run: one per task, recipe and example."""
        return len(self.tasks) * len(self.all_recipes) * self.limit

    def batches(self, task: Task, tokenizer: Any) -> list[dict[int, Example]]:
        """The examples of a task by number, in batches; the first two are small, to show soon how long batches take."""
        examples = {number: task.example(self.seed, number) for number in range(self.limit)}
        rest = {number: example for number, example in examples.items() if number > 0}
        second, *others = group_by_answer_length(tokenizer, rest, self.batch_size) or [[]]
        groups = [[0], second[:PACE_EXAMPLES], second[PACE_EXAMPLES:], *others]
        return [{number: examples[number] for number in group} for group in groups if group]


def measure_pace(config: EvaluationConfig, model: Any, processor: Any, store: ResultStore) -> None:
    """Measure two small batches of each task with the full cache and one recipe, for :func:`remaining_seconds`."""
    for task in config.tasks:
        for batch in config.batches(task, tokenizer_of(processor))[:2]:
            list(_measure_missing(config, task, batch, config.all_recipes[:2], model, processor, store))


def remaining_seconds(config: EvaluationConfig, store: ResultStore) -> float:
    """How long the missing results will take, at the pace of those that the store has of each task."""
    total = 0.0
    for task in config.tasks:
        paces = _paces(config, task, store)
        typical = fmean(list(paces.values())[1:] or paces.values()) if paces else 0.0
        for recipe in config.all_recipes:
            total += (config.limit - _done(config, task, recipe, store)) * paces.get(recipe, typical)
    return total


def run_evaluation(
    config: EvaluationConfig, model: Any, processor: Any, store: ResultStore, on_progress: OnProgress | None = None
) -> None:
    """Measure every result that the store lacks.

    Batches shrink where the store's results show that one would take longer than :data:`STEP_SECONDS` with a recipe.

    Args:
        config: what to measure.
        model: an unmodified transformers model.
        processor: its processor.
        store: where the results go.
        on_progress: called after each batch.
    """
    done = results_done(config, store)
    batches = [config.batches(task, tokenizer_of(processor)) for task in config.tasks]
    # Tasks are interleaved: some take longer than others, and the rate so far is to predict the time left.
    for round_ in zip_longest(*batches, fillvalue={}):
        for task, batch in zip(config.tasks, round_, strict=True):
            for recipe, count in _measure_missing(config, task, batch, config.all_recipes, model, processor, store):
                done += count
                if on_progress is not None:
                    on_progress(f"{task.label} {recipe.name} {recipe.budget:.3g}", done, config.total)


def results_done(config: EvaluationConfig, store: ResultStore) -> int:
    """How many of a run's results the store has."""
    return sum(_done(config, task, recipe, store) for task in config.tasks for recipe in config.all_recipes)


def _done(config: EvaluationConfig, task: Task, recipe: Method, store: ResultStore) -> int:
    """How many of a cell's results the store has; it may have more examples than the run."""
    return len(store.cell(task.label, recipe.to_json()).keys() & set(range(config.limit)))


def _measure_missing(
    config: EvaluationConfig,
    task: Task,
    batch: dict[int, Example],
    recipes: Sequence[Method],
    model: Any,
    processor: Any,
    store: ResultStore,
) -> Iterator[tuple[Method, int]]:
    """Measure the results of a batch that the store lacks; yields each recipe with the number of new results."""
    for lacking, examples in _missing(task, batch, recipes, store):
        numbers = list(examples)
        while numbers:
            part = {number: examples[number] for number in numbers[: _batch_size(config, task, store)]}
            numbers = numbers[len(part) :]
            for recipe in _measure(config, task, part, lacking, model, processor, store):
                yield recipe, len(part)


def _missing(
    task: Task, batch: dict[int, Example], recipes: Sequence[Method], store: ResultStore
) -> list[tuple[list[Method], dict[int, Example]]]:
    """The examples of a batch that lack results, grouped by the recipes that they lack."""
    groups: dict[tuple[int, ...], dict[int, Example]] = {}
    for number, example in batch.items():
        lacking = [place for place, each in enumerate(recipes) if number not in store.cell(task.label, each.to_json())]
        groups.setdefault(tuple(lacking), {})[number] = example
    return [([recipes[place] for place in lacking], group) for lacking, group in groups.items() if lacking]


def _paces(config: EvaluationConfig, task: Task, store: ResultStore) -> dict[Method, float]:
    """Seconds per example of each recipe that has results."""
    counts = {recipe: len(store.cell(task.label, recipe.to_json())) for recipe in config.all_recipes}
    return {recipe: store.seconds(task.label, recipe.to_json()) / count for recipe, count in counts.items() if count}


def _batch_size(config: EvaluationConfig, task: Task, store: ResultStore) -> int:
    """How many examples a batch may have, so that no recipe takes longer than :data:`STEP_SECONDS` for it."""
    slowest = max(_paces(config, task, store).values(), default=0.0)
    return config.batch_size if slowest == 0 else max(1, min(config.batch_size, int(STEP_SECONDS / slowest)))


def _measure(
    config: EvaluationConfig,
    task: Task,
    batch: dict[int, Example],
    recipes: Sequence[Method],
    model: Any,
    processor: Any,
    store: ResultStore,
) -> Iterator[Method]:
    """Measure a batch with each recipe in turn; its results are on disk when the recipe is yielded.

    The time of the prefill counts as the full cache's.
    """
    start = time.perf_counter()
    examples, tokenizer = list(batch.values()), tokenizer_of(processor)
    texts = [example for example in examples if isinstance(example, TextExample)]
    if texts:
        conversation = text_conversations(tokenizer, texts, model.device, passage_as_vision=config.passage_as_vision)
        check_length(model.config, conversation.inputs, conversation.answers[0].shape[1])
    else:
        conversation = conversations(processor, examples, model.device, model.dtype)
    snapshot = PrefillSnapshot(model, conversation.inputs)
    full = converse(snapshot, FULL, conversation)
    full_seconds = time.perf_counter() - start
    ends = set() if conversation.forced else end_tokens(model, tokenizer)
    for recipe in recipes:
        start = time.perf_counter()
        if recipe is FULL:
            turns = full
        elif isinstance(recipe, KvpressMethod):
            turns = recipe.follow(conversation)
        else:
            turns = converse(snapshot, recipe, conversation, config.keep, config.host_dtype)
        results = score_answers(examples, conversation, turns, full, tokenizer, ends)
        if recipe is FULL:
            for example, result in zip(examples, results, strict=True):
                if not texts:
                    result["needed"], result["records"] = answer_patch_share(example), record_count(example)
        seconds = time.perf_counter() - start + (full_seconds if recipe is FULL else 0.0)
        store.append(task.label, recipe.to_json(), dict(zip(batch, results, strict=True)), seconds)
        yield recipe


def score_answers(
    examples: Sequence[Example],
    conversation: Conversations,
    turns: Sequence[Turn],
    full: Sequence[Turn],
    tokenizer: Any,
    ends: set[int],
) -> list[ExampleResult]:
    """The result of each example of a batch.

    Matches and similarities are means over the example's turns; ``surprisal`` and ``divergence`` (in nats) and
    ``tokens`` are sums over the tokens of its right answers.

    Args:
        examples: the batch.
        conversation: the same, as token ids.
        turns: what the model answered with a recipe's cache.
        full: what it answered with the full cache.
        tokenizer: the model's tokenizer.
        ends: tokens that end an answer; none if answers are forced.
    """
    sums = {"surprisal": torch.zeros(len(examples)), "divergence": torch.zeros(len(examples))}
    for answer, turn, reference in zip(conversation.answers, turns, full, strict=True):
        sums["surprisal"] = sums["surprisal"] + surprisal(turn.logits, answer).cpu()
        sums["divergence"] = sums["divergence"] + divergence(turn.logits, reference.logits).cpu()
    results = []
    for index, example in enumerate(examples):
        generated = [until_end(turn.tokens[index].tolist(), ends) for turn in turns]
        reference_tokens = [until_end(turn.tokens[index].tolist(), ends) for turn in full]
        answers = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generated]
        pairs = [(answer, right) for answer, (_, right) in zip(answers, example.turns, strict=True)]
        token_pairs = list(zip(generated, reference_tokens, strict=True))
        results.append(
            {
                "answers": answers,
                "exact": fmean(exact_match(*pair) for pair in pairs),
                "anls": fmean(anls(*pair) for pair in pairs),
                "rouge_l": fmean(rouge_l(*pair) for pair in pairs),
                "same_answer": fmean(float(one == other) for one, other in token_pairs),
                "same_tokens": fmean(same_tokens(one, other) for one, other in token_pairs),
                "held": turns[0].held,
                "tokens": sum(answer.shape[1] for answer in conversation.answers),
                **{name: values[index].item() for name, values in sums.items()},
            }
        )
    return results


def until_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """The tokens before the first end-of-sequence token."""
    return list(takewhile(lambda token: token not in ends, tokens))


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer of a model."""
    given = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}


def weights_digest(model: Any) -> str:
    """A hash that distinguishes a model's weights from others, over the first 1,024 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
