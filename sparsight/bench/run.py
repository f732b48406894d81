"""A run: every case of a size takes its turn in every round, so that a machine whose speed drifts slows all of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from sparsight.bench import machine
from sparsight.bench.measure import Sample, measure
from sparsight.bench.shapes import random_inputs
from sparsight.cache import CompressedCache
from sparsight.recipe import Recipe

TRANSFORMERS = "transformers"
KEPT_LENGTH = "kept-length"
RIVALS = {
    TRANSFORMERS: "plain transformers with the whole cache",
    KEPT_LENGTH: "plain transformers given a prompt of only the kept length",
}
"""What methods are compared with."""


@dataclass(frozen=True)
class Plan:
    """What is measured: every recipe and rival at every context and batch.

    Args:
        contexts: prompt tokens.
        batches: prompts that are answered together.
        recipes: methods with their budgets.
        against: names of :data:`RIVALS`.
        new_tokens: tokens of an answer, at least two.
        rounds: rounds that count, after one that does not.
    """

    contexts: Sequence[int]
    batches: Sequence[int]
    recipes: Sequence[Recipe]
    against: Sequence[str]
    new_tokens: int
    rounds: int


@dataclass
class Cell:
    """One way of answering prompts of one size.

    Attributes:
        method: a recipe's name, or one of :data:`RIVALS`.
        budget: fraction of the prompt's entries kept, or of its tokens given.
        samples: what every round took.
        reason: why there are none.
    """

    method: str
    budget: float
    context: int
    batch: int
    recipe: Recipe | None = None
    samples: list[Sample] = field(default_factory=list)
    reason: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each prompt that the model is given."""
        return max(1, round(self.budget * self.context)) if self.method == KEPT_LENGTH else self.context


def cells(plan: Plan, context: int, batch: int) -> list[Cell]:
    """The cells of one size, those that others are compared with first."""
    found = [Cell(TRANSFORMERS, 1.0, context, batch)] if TRANSFORMERS in plan.against else []
    if KEPT_LENGTH in plan.against:
        budgets = sorted({recipe.budget for recipe in plan.recipes} - {1.0})
        found += [Cell(KEPT_LENGTH, budget, context, batch) for budget in budgets]
    return found + [Cell(recipe.name, recipe.budget, context, batch, recipe) for recipe in plan.recipes]


def run(
    plan: Plan, model: PreTrainedModel, on_progress: Callable[[str, int, int], None]
) -> Iterator[tuple[list[Cell], float]]:
    """Measure size by size: its cells, and the copy bandwidth in bytes a second, the best of its rounds."""
    total = len(plan.contexts) * len(plan.batches) * (plan.rounds + 1)
    done = 0
    for context in plan.contexts:
        for batch in plan.batches:
            measured = cells(plan, context, batch)
            bandwidth = 0.0
            for round_ in range(plan.rounds + 1):
                on_progress(f"{context} tokens x {batch}", done, total)
                bandwidth = max(bandwidth, machine.copy_bandwidth(model.device))
                for cell in measured:
                    if cell.reason is None:
                        _measure(cell, model, plan.new_tokens, counted=round_ > 0)
                done += 1
            yield measured, bandwidth
    on_progress("done", total, total)


def _measure(cell: Cell, model: PreTrainedModel, new_tokens: int, *, counted: bool) -> None:
    """Add a sample to a cell, or the reason why it has none."""
    config = model.config.get_text_config()
    needed = prefill_bytes(config, cell.prompt_tokens, cell.batch, new_tokens, model.dtype.itemsize)
    free = machine.available_bytes(model.device)
    if needed > free:
        cell.reason = f"does not fit: about {_gib(needed)} GiB needed, {_gib(free)} GiB free"
        return
    inputs = random_inputs(model, cell.prompt_tokens, cell.batch)
    cache: Cache = CompressedCache(model, cell.recipe, inputs) if cell.recipe else DynamicCache(config=config)
    try:
        sample = measure(model, inputs["input_ids"], cache, new_tokens)
    except RuntimeError as error:
        # CUDA has an exception of its own for it, the CPU's allocator has not.
        if "memory" not in str(error) or "allocate" not in str(error):
            raise
        cell.samples.clear()
        cell.reason = "does not fit: memory ran out"
        return
    if counted:
        cell.samples.append(sample)


def prefill_bytes(config: PreTrainedConfig, tokens: int, batch: int, new_tokens: int, itemsize: int) -> int:
    """About what answering takes beside the weights: the full cache and one more layer of it, and one MLP's states."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 2 * config.num_key_value_heads * head * (tokens + new_tokens)
    states = (4 * config.hidden_size + 3 * config.intermediate_size) * tokens
    return batch * itemsize * (layer * (config.num_hidden_layers + 1) + states)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
