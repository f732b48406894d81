"""A benchmark: cases of a size are interleaved in rounds, so that changes of the machine's speed affect all of them."""

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
from sparsight.utils import memory

TRANSFORMERS = "transformers"
KEPT_LENGTH = "kept-length"
KVPRESS = "kvpress"
REFERENCES = (TRANSFORMERS, KEPT_LENGTH, KVPRESS)
"""What methods are compared with: plain transformers with the full prompt, and with a prompt of only as many tokens as
a method keeps; kvpress's SnapKV."""
LIBRARIES = {"transformers": (TRANSFORMERS, KEPT_LENGTH), "kvpress": (KVPRESS,)}
"""The cases of each library."""
WARM_UP_TOKENS = 8
TIME_UP = "not measured: the time was up"
INTERRUPTED = "not measured: the run was interrupted"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured: every recipe and library at every context and batch size.

    Args:
        contexts: numbers of prompt tokens.
        batches: batch sizes.
        recipes: methods at their budgets.
        against: names in :data:`LIBRARIES`.
        new_tokens: tokens per answer, at least two.
        rounds: measured rounds, after one for warm-up.
        minutes: no case starts later than this.
        compiled: whether methods decode with compiled steps on a CPU.
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
class Case:
    """One method with prompts of one size, and its measurements.

    Attributes:
        method: a recipe's name, or one of :data:`REFERENCES`.
        budget: fraction of the prompt's entries kept; of its tokens given, where the prompt is shortened.
        samples: the measurement of every round.
        bandwidths: bytes per second of a large copy, measured after each sample.
        reason: why there are no samples.
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
        """Tokens per prompt."""
        return max(1, round(self.budget * self.context)) if self.method == KEPT_LENGTH else self.context


def cases(config: BenchmarkConfig, context: int, batch: int) -> list[Case]:
    """The cases of one size, references first."""
    budgets = sorted({recipe.budget for recipe in config.recipes} - {1.0})
    references = [
        Case(name, budget, context, batch)
        for library in config.against
        for name in LIBRARIES[library]
        for budget in ([1.0] if name == TRANSFORMERS else budgets)
    ]  # fmt: skip
    return references + [Case(recipe.name, recipe.budget, context, batch, recipe) for recipe in config.recipes]


def run_benchmark(
    config: BenchmarkConfig,
    model: PreTrainedModel,
    on_progress: Callable[[str, int, int], None],
    kvpress: Kvpress | CannotRun | None = None,
) -> Iterator[list[Case]]:
    """Measure one size after the other, small ones first, and yield its cases.

    A size that is interrupted by KeyboardInterrupt is yielded with the rounds that it completed, before that is raised.
    """
    sizes = sorted(product(config.contexts, config.batches), key=prod)
    total = len(sizes) * (config.rounds + 1)
    end = time.monotonic() + 60 * config.minutes
    for number, (context, batch) in enumerate(sizes):
        measured = cases(config, context, batch)
        try:
            for round_ in range(config.rounds + 1):
                on_progress(f"{context} tokens x {batch}", number * (config.rounds + 1) + round_, total)
                # A short answer is enough for warm-up.
                new_tokens = config.new_tokens if round_ else min(config.new_tokens, WARM_UP_TOKENS)
                tokens_to_come = static_capacity(model, new_tokens, compile=config.compiled)
                # Another order in each round: the state that a case leaves in memory affects the next one.
                for case in Random(round_).sample(measured, len(measured)):
                    if case.reason is None and time.monotonic() < end:
                        _measure(case, model, new_tokens, tokens_to_come, kvpress, counted=round_ > 0)
        except KeyboardInterrupt:
            _drop_incomplete_rounds(measured, INTERRUPTED)
            yield measured
            raise
        _drop_incomplete_rounds(measured, TIME_UP)
        yield measured
    on_progress("done", total, total)


def _drop_incomplete_rounds(measured: Sequence[Case], reason: str) -> None:
    """Keep the rounds that all cases completed; without any, cases get the reason."""
    running = [case for case in measured if case.reason is None]
    rounds = min((len(case.bandwidths) for case in running), default=0)
    for case in running:
        del case.samples[rounds:], case.bandwidths[rounds:]
        case.reason = None if rounds else reason


def _measure(
    case: Case,
    model: PreTrainedModel,
    new_tokens: int,
    tokens_to_come: int | None,
    kvpress: Kvpress | CannotRun | None,
    *,
    counted: bool,
) -> None:
    """Add a sample to a case, or the reason why it has none."""
    try:
        sample = _sample(case, model, new_tokens, tokens_to_come, kvpress)
    except CannotRun as error:
        case.samples.clear()
        case.bandwidths.clear()
        case.reason = str(error)
        return
    if counted:
        case.samples.append(sample)
        case.bandwidths.append(machine.copy_bandwidth(model.device))


def _sample(
    case: Case,
    model: PreTrainedModel,
    new_tokens: int,
    tokens_to_come: int | None,
    kvpress: Kvpress | CannotRun | None,
) -> Sample:
    config = model.config.get_text_config()
    needed = prefill_bytes(config, case.prompt_tokens, case.batch, new_tokens, model.dtype.itemsize)
    free = memory.available_bytes(model.device)
    if needed > free:
        raise CannotRun(f"does not fit: about {_gib(needed)} GiB needed, {_gib(free)} GiB free")
    if case.method == KVPRESS:
        if not isinstance(kvpress, Kvpress):
            raise CannotRun(str(kvpress))
        with machine.released_memory(model.device):
            return kvpress.measure(case.budget, case.context, case.batch, new_tokens, needed)
    inputs = random_inputs(model, case.prompt_tokens, case.batch)
    cache: Cache = DynamicCache(config=config)
    if case.recipe:
        cache = CompressedCache(model, case.recipe, inputs, tokens_to_come)
    try:
        return measure(model, inputs["input_ids"], cache, new_tokens)
    except RuntimeError as error:
        # CUDA raises OutOfMemoryError, the CPU allocator a plain RuntimeError.
        if "memory" not in str(error) or "allocate" not in str(error):
            raise
        raise CannotRun("does not fit: memory ran out") from error


def prefill_bytes(config: PreTrainedConfig, tokens: int, batch: int, new_tokens: int, itemsize: int) -> int:
    """Approximate bytes of an answer without weights: the full cache, one more layer of it, and one MLP's states."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 2 * config.num_key_value_heads * head * (tokens + new_tokens)
    states = (4 * config.hidden_size + 3 * config.intermediate_size) * tokens
    return batch * itemsize * (layer * (config.num_hidden_layers + 1) + states)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
