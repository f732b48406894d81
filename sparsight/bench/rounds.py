"""A run: every case of a size takes its turn in every round, so that a machine whose speed drifts slows all of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf, prod
from random import Random

from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from sparsight.bench import machine
from sparsight.bench.kvpress import CannotRun, Kvpress
from sparsight.bench.measure import Sample, measure
from sparsight.bench.shapes import random_inputs
from sparsight.cache import CompressedCache
from sparsight.compression.recipe import Recipe
from sparsight.engine.model_runner import static_capacity

TRANSFORMERS = "transformers"
KEPT_LENGTH = "kept-length"
KVPRESS = "kvpress"
OTHERS = (TRANSFORMERS, KEPT_LENGTH, KVPRESS)
"""What methods are compared with, a name of a cell."""
RIVALS = {"transformers": (TRANSFORMERS, KEPT_LENGTH), "kvpress": (KVPRESS,)}
"""Libraries: plain transformers, with the whole prompt and with one of only the kept length; kvpress's SnapKV."""
WARM_UP_TOKENS = 8
TIME_UP = "not measured: the time was up"


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
        minutes: no case begins later than this.
        compiled: whether methods decode with steps that are compiled where they are not recorded otherwise, on a CPU.
    """

    contexts: Sequence[int]
    batches: Sequence[int]
    recipes: Sequence[Recipe]
    against: Sequence[str]
    new_tokens: int
    rounds: int
    minutes: float = inf
    compiled: bool = False


@dataclass
class Cell:
    """One way of answering prompts of one size.

    Attributes:
        method: a recipe's name, or one of :data:`OTHERS`.
        budget: fraction of the prompt's entries kept, or of its tokens given.
        samples: what every round took.
        bandwidths: bytes a second of a large copy, right after each sample.
        reason: why there are none.
    """

    method: str
    budget: float
    context: int
    batch: int
    recipe: Recipe | None = None
    samples: list[Sample] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    reason: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each prompt that the model is given."""
        return max(1, round(self.budget * self.context)) if self.method == KEPT_LENGTH else self.context


def cells(plan: Plan, context: int, batch: int) -> list[Cell]:
    """The cells of one size, those that others are compared with first."""
    budgets = sorted({recipe.budget for recipe in plan.recipes} - {1.0})
    others = [name for library in plan.against for name in RIVALS[library]]
    found = [
        Cell(name, budget, context, batch)
        for name in others
        for budget in ([1.0] if name == TRANSFORMERS else budgets)
    ]  # fmt: skip
    return found + [Cell(recipe.name, recipe.budget, context, batch, recipe) for recipe in plan.recipes]


def run(
    plan: Plan,
    model: PreTrainedModel,
    on_progress: Callable[[str, int, int], None],
    kvpress: Kvpress | CannotRun | None = None,
) -> Iterator[list[Cell]]:
    """Measure the cells of one size after the other, small ones first."""
    sizes = sorted(product(plan.contexts, plan.batches), key=prod)
    total = len(sizes) * (plan.rounds + 1)
    end = time.monotonic() + 60 * plan.minutes
    for number, (context, batch) in enumerate(sizes):
        measured = cells(plan, context, batch)
        for round_ in range(plan.rounds + 1):
            on_progress(f"{context} tokens x {batch}", number * (plan.rounds + 1) + round_, total)
            # The round that does not count shows each case what it will meet, not all of it.
            new_tokens = plan.new_tokens if round_ else min(plan.new_tokens, WARM_UP_TOKENS)
            tokens_to_come = static_capacity(model, new_tokens, compile=plan.compiled)
            # What a case leaves behind, in memory and in another process, should not always meet the same one.
            for cell in Random(round_).sample(measured, len(measured)):
                if cell.reason is None and time.monotonic() < end:
                    _measure(cell, model, new_tokens, tokens_to_come, kvpress, counted=round_ > 0)
        _close(measured)
        yield measured
    on_progress("done", total, total)


def _close(measured: Sequence[Cell]) -> None:
    """Leave only rounds that all cells have taken part in, where the time was up."""
    open_ = [cell for cell in measured if cell.reason is None]
    rounds = min((len(cell.samples) for cell in open_), default=0)
    for cell in open_:
        del cell.samples[rounds:], cell.bandwidths[rounds:]
        cell.reason = None if rounds else TIME_UP


def _measure(
    cell: Cell,
    model: PreTrainedModel,
    new_tokens: int,
    tokens_to_come: int | None,
    kvpress: Kvpress | CannotRun | None,
    *,
    counted: bool,
) -> None:
    """Add a sample to a cell, or the reason why it has none."""
    try:
        sample = _sample(cell, model, new_tokens, tokens_to_come, kvpress)
    except CannotRun as error:
        cell.samples.clear()
        cell.bandwidths.clear()
        cell.reason = str(error)
        return
    if counted:
        cell.samples.append(sample)
        cell.bandwidths.append(machine.copy_bandwidth(model.device))


def _sample(
    cell: Cell,
    model: PreTrainedModel,
    new_tokens: int,
    tokens_to_come: int | None,
    kvpress: Kvpress | CannotRun | None,
) -> Sample:
    config = model.config.get_text_config()
    needed = prefill_bytes(config, cell.prompt_tokens, cell.batch, new_tokens, model.dtype.itemsize)
    free = machine.available_bytes(model.device)
    if needed > free:
        raise CannotRun(f"does not fit: about {_gib(needed)} GiB needed, {_gib(free)} GiB free")
    if cell.method == KVPRESS:
        if not isinstance(kvpress, Kvpress):
            raise CannotRun(str(kvpress))
        with machine.lent(model.device):
            return kvpress.measure(cell.budget, cell.context, cell.batch, new_tokens, needed)
    inputs = random_inputs(model, cell.prompt_tokens, cell.batch)
    cache: Cache = DynamicCache(config=config)
    if cell.recipe:
        cache = CompressedCache(model, cell.recipe, inputs, tokens_to_come)
    try:
        return measure(model, inputs["input_ids"], cache, new_tokens)
    except RuntimeError as error:
        # CUDA has an exception of its own for it, the CPU's allocator has not.
        if "memory" not in str(error) or "allocate" not in str(error):
            raise
        raise CannotRun("does not fit: memory ran out") from error


def prefill_bytes(config: PreTrainedConfig, tokens: int, batch: int, new_tokens: int, itemsize: int) -> int:
    """About what answering takes beside the weights: the full cache and one more layer of it, and one MLP's states."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 2 * config.num_key_value_heads * head * (tokens + new_tokens)
    states = (4 * config.hidden_size + 3 * config.intermediate_size) * tokens
    return batch * itemsize * (layer * (config.num_hidden_layers + 1) + states)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
