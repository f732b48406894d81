"""A batch inference job, and how it runs on this machine."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sparsight.batch_inference.generator import BatchGenerator
from sparsight.batch_inference.output import Result
from sparsight.batch_inference.preprocessing import Preprocessor, preprocess_ahead
from sparsight.batch_inference.rows import Row, check_unique, parse_row, read_ids, read_rows
from sparsight.compression.recipe import Recipe
from sparsight.methods import VLCache
from sparsight.models.images import MAX_PIXELS
from sparsight.models.loading import Checkpoint, load_checkpoint, load_model


@dataclass(frozen=True)
class Job:
    """The model and the settings that every row is answered with.

    Args:
        checkpoint: the model.
        recipe: how caches are compressed.
        max_new_tokens: longest answer.
        batch_size: sequences that decode together; None for as many as fit in memory.
        device, dtype: as :func:`sparsight.models.loading.load_model` takes them.
        max_pixels: largest image.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    max_new_tokens: int = 100
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be an integer above 0 or None, got {self.batch_size!r}.")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the results, JSON serializable: equal settings give equal results."""
        recipe = json.loads(self.recipe.to_json())
        return {
            "model": self.checkpoint.name,
            "dtype": self.dtype,
            "method": recipe.pop("name"),
            **recipe,
            "max_new_tokens": self.max_new_tokens,
            "max_pixels": self.max_pixels,
        }

    @property
    def preprocessor(self) -> Preprocessor:
        """Makes the model's inputs from rows."""
        return Preprocessor(self.checkpoint, self.max_new_tokens, self.max_pixels)

    def load_generator(self) -> BatchGenerator:
        """Load the weights.

        Raises:
            ValueError: they cannot be loaded.
        """
        model = load_model(self.checkpoint, self.device, self.dtype)
        return BatchGenerator(model, self.preprocessor, self.recipe, self.batch_size)


def run_job(job: Job, rows: Iterable[Row]) -> Iterator[list[Result]]:
    """Results of all rows, a batch at a time, in the order in which batches finish.

    Raises:
        ValueError: the model cannot be loaded, or a process that opens images died.
    """
    with closing(preprocess_ahead(job.preprocessor, rows)) as preprocessed:
        # The workers start with the first row and preprocess while the weights are loaded.
        first = list(islice(preprocessed, 1))
        if first:
            yield from job.load_generator().generate(chain(first, preprocessed))


def batch(
    source: str | Path | Iterable[Mapping[str, Any]],
    prompt: str | None = None,
    *,
    model: str,
    recipe: Recipe | None = None,
    max_new_tokens: int = 100,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Iterator[Result]:
    """Ask a model about many images, and yield each result as soon as it is known, in no particular order.

    ::

        for result in sparsight.batch("invoices/", "What is the total?", model="llava-hf/llava-1.5-7b-hf"):
            print(result.id, result.error or result.text)

    Args:
        source: a file or folder as ``sparsight batch`` takes it, or mappings such as ``{"id": "7", "image": "page.png",
            "prompt": "What is this?"}``; ``image`` may hold a file's bytes, and ``images`` several.
        prompt: the prompt of the rows that have none.
        model: folder or hub id.
        recipe: how caches are compressed; VL-Cache at 10 % if None.
        max_new_tokens: longest answer.
        batch_size: sequences that decode together; None for as many as fit in memory.
        device: a torch device, or ``auto``: the first GPU if there is one.
        dtype: type of the weights, or ``auto``: the type that they were saved in.

    Raises:
        ValueError: the source or the model cannot be read. A problem with a single row is its result's ``error``.
    """
    if isinstance(source, str | Path):
        read_ids(Path(source), prompt)
        rows: Iterable[Row] = read_rows(Path(source), prompt)
    else:
        rows = [parse_row(values, f"row {number}", Path(), prompt) for number, values in enumerate(source, 1)]
        check_unique(row.id for row in rows)
    checkpoint = load_checkpoint(model)
    job = Job(checkpoint, recipe or VLCache(), max_new_tokens, batch_size, device, dtype)
    return (result for batch in run_job(job, rows) for result in batch)
