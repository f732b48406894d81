"""A model's answers to many rows, on this machine."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sparsight.batch_inference.answerer import Answerer
from sparsight.batch_inference.output import Result
from sparsight.batch_inference.preparation import Preparation, prepared_ahead
from sparsight.batch_inference.rows import Row, check_different, read_ids, read_rows, row_of
from sparsight.compression.recipe import Recipe
from sparsight.methods import VLCache
from sparsight.models.images import MAX_PIXELS
from sparsight.models.loading import Checkpoint, load_checkpoint, load_model


@dataclass(frozen=True)
class Job:
    """What is done with every row.

    Args:
        checkpoint: the model.
        recipe: how its caches are compressed.
        max_new_tokens: how long an answer may be.
        batch_size: rows that decode together; None for as many as there is room for.
        device, dtype: as :func:`sparsight.models.loading.load_model` takes them.
        max_pixels: how large a picture may be.
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
            raise ValueError(f"batch_size must be a whole number above 0 or None, got {self.batch_size!r}.")

    @property
    def about(self) -> dict[str, Any]:
        """What decides the results, as JSON has it: the same job gives the same results."""
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
    def preparation(self) -> Preparation:
        """What the rows are prepared for."""
        return Preparation(self.checkpoint, self.max_new_tokens, self.max_pixels)

    def answerer(self) -> Answerer:
        """Load the weights.

        Raises:
            ValueError: they cannot be loaded.
        """
        model = load_model(self.checkpoint, self.device, self.dtype)
        return Answerer(model, self.preparation, self.recipe, self.batch_size)


def results(job: Job, rows: Iterable[Row]) -> Iterator[list[Result]]:
    """Results of all rows, those of a batch together, in the order in which they are known.

    Raises:
        ValueError: the model cannot be loaded, or a process that opens pictures died.
    """
    with closing(prepared_ahead(job.preparation, rows)) as ahead:
        # The processes begin with the first row, while the weights are loaded.
        first = list(zip(range(1), ahead, strict=False))
        if first:
            yield from job.answerer().answer(chain([row for _, row in first], ahead))


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
    """Ask a model about many pictures, and yield each result as soon as it is known, in no order.

    ::

        for result in sparsight.batch("invoices/", "What is the total?", model="llava-hf/llava-1.5-7b-hf"):
            print(result.id, result.error or result.text)

    Args:
        source: a file or folder as ``sparsight batch`` takes it, or mappings such as ``{"id": "7", "image": "page.png",
            "prompt": "What is this?"}``; ``image`` may hold a file's bytes, and ``images`` several.
        prompt: the prompt of the rows that have none.
        model: folder or hub id.
        recipe: how the caches are compressed; VL-Cache at 10 % if None.
        max_new_tokens: how long an answer may be.
        batch_size: rows that decode together; None for as many as there is room for.
        device: a torch device, or ``auto``: the first GPU if there is one.
        dtype: type of the weights, or ``auto``: the one that they were saved in.

    Raises:
        ValueError: the source or the model cannot be read. What is wrong with a row alone is its result's ``error``.
    """
    if isinstance(source, str | Path):
        read_ids(Path(source), prompt)
        rows: Iterable[Row] = read_rows(Path(source), prompt)
    else:
        rows = [row_of(given, f"row {number}", Path(), prompt) for number, given in enumerate(source, 1)]
        check_different(row.id for row in rows)
    checkpoint = load_checkpoint(model)
    job = Job(checkpoint, recipe or VLCache(), max_new_tokens, batch_size, device, dtype)
    return (result for some in results(job, rows) for result in some)
