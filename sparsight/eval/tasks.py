"""Tasks: questions about generated pages, and text to go on with for models without images.

Examples are drawn from a seed: pages from the held-out split of :mod:`sparsight.reader`, text from
:mod:`sparsight.eval.passages`. Nothing is downloaded.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sparsight.eval.passages import MOST_SHOTS, MOST_WORDS, continuation, few_shot, planted_sentence
from sparsight.reader.page import PATCH, WIDTH, Page, capacity, random_page
from sparsight.reader.skills import WHICH_IMAGE, Example, ask_page, look_up, pick, read_out
from sparsight.utils.suggest import unknown

SPLIT = "heldout"
CONVERSATION_RECORDS = 32
"""Records on the page of a conversation."""

PAGE_METRICS = ("exact", "anls", "rouge_l", "perplexity", "same_answer", "same_tokens", "divergence")
TEXT_METRICS = ("perplexity", "divergence", "same_tokens", "held")
"""Metrics of a cache along the right answer."""

SMALLEST = 8
"""Records on the smallest of the growing pages; the next ones have 2, 3, ... times as many."""


@dataclass(frozen=True)
class Task:
    """A kind of example.

    Args:
        name: the task's name.
        summary: what the question is about.
        size: number of records or questions.
        counts: what ``size`` counts, for messages.
        largest: the largest size.
        metric: the main metric, a name in :data:`sparsight.eval.metrics.METRICS`.
        make: makes an example from a generator, the size and the number of the example.
        metrics: all metrics.
    """

    name: str
    summary: str
    size: int
    counts: str
    largest: int
    metric: str
    make: Callable[[np.random.Generator, int, int], Example]
    metrics: tuple[str, ...] = PAGE_METRICS

    @property
    def label(self) -> str:
        """Name and size, as ``--tasks`` takes them."""
        return f"{self.name}:{self.size}"

    def example(self, seed: int, number: int) -> Example:
        """The example with a number; it depends on the seed, the size and the number only."""
        return self.make(np.random.default_rng([seed, zlib.crc32(self.name.encode()), number]), self.size, number)


def _two_pages(rng: np.random.Generator, size: int, number: int) -> Example:
    pages = tuple(random_page(rng, size, SPLIT) for _ in range(2))
    which = int(rng.integers(2))
    question, answer = ask_page(rng, pages[which], 1)[0]
    return Example(pages, ((pick(rng, WHICH_IMAGE, nth=("first", "second")[which], question=question), answer),))


def _growing(rng: np.random.Generator, size: int, number: int) -> Example:
    steps = max(1, size // SMALLEST)
    return look_up(rng, SPLIT, min(SMALLEST * (1 + number % steps), size))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="look-up",
            summary="one record of a page",
            size=32,
            counts="records on the page",
            largest=64,
            metric="exact",
            make=lambda rng, size, number: look_up(rng, SPLIT, size),
        ),
        Task(
            name="conversation",
            summary=f"several records of a page of {CONVERSATION_RECORDS}, one question after the other",
            size=4,
            counts="questions",
            largest=CONVERSATION_RECORDS,
            metric="exact",
            make=lambda rng, size, number: look_up(rng, SPLIT, CONVERSATION_RECORDS, questions=size),
        ),
        Task(
            name="transcribe",
            summary="the complete page, read out",
            size=12,
            counts="records on the page",
            largest=capacity(WIDTH) - 1,
            metric="rouge_l",
            make=lambda rng, size, number: read_out(rng, SPLIT, size),
        ),
        Task(
            name="two-pages",
            summary="one record of two pages, on the page that the question names",
            size=16,
            counts="records on each page",
            largest=64,
            metric="exact",
            make=_two_pages,
        ),
        Task(
            name="growing",
            summary=f"one record of a page; pages have {SMALLEST}, {2 * SMALLEST}, ... records",
            size=64,
            counts="records on the largest page",
            largest=64,
            metric="exact",
            make=_growing,
        ),
    )
}
"""The tasks of vision-language models by name."""

TEXT_TASKS = {
    task.name: task
    for task in (
        Task(
            name="continuation",
            summary="how a passage of documentation goes on",
            size=800,
            counts="words of the passage",
            largest=MOST_WORDS,
            metric="perplexity",
            make=lambda rng, size, number: continuation(rng, size),
            metrics=TEXT_METRICS,
        ),
        Task(
            name="retrieval",
            summary="a sentence planted in a passage of documentation",
            size=800,
            counts="words of the passage",
            largest=MOST_WORDS,
            metric="exact",
            make=lambda rng, size, number: planted_sentence(rng, size),
            metrics=("exact", *TEXT_METRICS),
        ),
        Task(
            name="few-shot",
            summary="the category of a word, after other words with theirs",
            size=64,
            counts="words with their categories",
            largest=MOST_SHOTS,
            metric="exact",
            make=lambda rng, size, number: few_shot(rng, size),
            metrics=("exact", *TEXT_METRICS),
        ),
    )
}
"""The tasks of models without images by name."""


def task(text: str, tasks: Mapping[str, Task] = TASKS) -> Task:
    """A task by name, such as ``look-up``, or by name and size, such as ``look-up:64``.

    Raises:
        ValueError: there is no such task, or the size is out of its range.
    """
    name, colon, size = text.partition(":")
    if name not in tasks:
        raise unknown("task", name, tasks)
    known = tasks[name]
    if not colon:
        return known
    if not size.isdecimal() or not 1 <= int(size) <= known.largest:
        counts, largest = known.counts, known.largest
        raise ValueError(f"Task {name} takes the number of {counts} as its size, 1 to {largest}, not {size!r}.")
    return replace(known, size=int(size))


def record_count(example: Example) -> int:
    """Number of records on the first page of an example."""
    page = example.images[0]
    return len(page.records) if isinstance(page, Page) else 0


def answer_patch_share(example: Example) -> float:
    """Fraction of the images' patches that show a character of a record that an answer needs."""
    patches = {
        (number, *patch)
        for question, answer in example.turns
        for number, page in enumerate(example.images)
        if isinstance(page, Page)
        for patch in _patches(page, question, answer)
    }
    return len(patches) / sum((image.height // PATCH) * (WIDTH // PATCH) for image in example.images)


def _patches(page: Page, question: str, answer: str) -> set[tuple[int, int]]:
    """Rows and columns of the patches that show the records that a question is about."""
    key = re.search(r"\b[A-Z]{2}\b", question)
    wanted = [record for record in page.records if key is None or record == (key[0], answer)]
    printed, centres = "".join(glyph.char for glyph in page.glyphs), page.centres()
    patches = set()
    for name, value in wanted:
        found = re.search(rf"{name}[:=./-]*{value}", printed)
        assert found is not None, f"{name} {value} is not on its page"
        patches |= {(int(y // PATCH), int(x // PATCH)) for _, x, y in centres[found.start() : found.end()]}
    return patches
