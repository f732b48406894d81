"""Batch inference from Python."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from sparsight.batch_inference.input import Input
from sparsight.batch_inference.job import Job, run_job
from sparsight.batch_inference.result import Result
from sparsight.batch_inference.rows import Row, check_unique, parse_row
from sparsight.compression.recipe import Recipe
from sparsight.methods import VLCache
from sparsight.models.loading import Checkpoint, load_checkpoint
from sparsight.reader import model_path

Item = Mapping[str, Any] | str | Path | Image.Image
"""A row as Python has it: a mapping, or an image alone."""


def batch(
    source: str | Path | Iterable[Item],
    prompt: str | None = None,
    *,
    model: str | Path | PreTrainedModel | None = None,
    processor: Any = None,
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
        source: a file or folder as ``sparsight batch`` takes it, or rows. A row is a mapping such as ``{"id": "7",
            "image": "page.png", "prompt": "What is this?"}``; ``image`` may be a path, a file's bytes or a PIL image,
            and ``images`` several of them. A path or a PIL image alone is a row as well; its id is the path, or the
            position in the source, counted from 0.
        prompt: the prompt of the rows that have none.
        model: folder, hub id, or a loaded model; the small model that ships with the package if None.
        processor: the processor of a loaded model; the one at ``model.name_or_path`` if None.
        recipe: how caches are compressed; VL-Cache at 10 % if None.
        max_new_tokens: longest answer.
        batch_size: sequences that decode together; None for as many as fit in memory.
        device: a torch device, or ``auto``: the first GPU if there is one. A loaded model stays where it is.
        dtype: type of the weights, or ``auto``: the type that they were saved in.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the source or the model cannot be read. A problem with a single row is its result's ``error``.
    """
    _check_types(source=source, prompt=prompt, model=model, recipe=recipe, device=device, dtype=dtype)
    loaded = model if isinstance(model, PreTrainedModel) else None
    if loaded is None and processor is not None:
        raise ValueError("processor is for a loaded model; a model given by name has its own.")
    if loaded is not None and (device, dtype) != ("auto", "auto"):
        raise ValueError("device and dtype are for a model given by name; a loaded model stays as it is.")
    if isinstance(source, str | Path):
        given = Input(Path(source), prompt)
        given.scan()
        rows: Iterable[Row] = given.rows()
    else:
        rows = [_row(item, index, prompt) for index, item in enumerate(source)]
        check_unique(rows)
    checkpoint = load_checkpoint(str(model or model_path())) if loaded is None else _checkpoint(loaded, processor)
    job = Job(checkpoint, recipe or VLCache(), max_new_tokens, batch_size, device, dtype)
    return (result for results in run_job(job, rows, loaded) for result in results)


class _LoadedCheckpoint(Checkpoint):
    """A checkpoint whose processor was passed, and may differ from the one on disk: workers get a copy of it."""

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.config, self.processor)


def _checkpoint(model: PreTrainedModel, processor: Any) -> Checkpoint:
    if processor is not None:
        return _LoadedCheckpoint(model.name_or_path or "", model.config, processor)
    if not model.name_or_path:
        raise ValueError("A loaded model without name_or_path needs its processor: pass processor=.")
    return load_checkpoint(model.name_or_path)


def _row(item: Item, index: int, prompt: str | None) -> Row:
    """The row of an item of the source.

    Raises:
        TypeError: it is not a row.
    """
    if isinstance(item, Mapping):
        return parse_row(item, ("Row", index), Path(), prompt)
    if isinstance(item, str | Path):
        return parse_row({"id": str(item), "image": item}, ("Row", index), Path(), prompt)
    if isinstance(item, Image.Image):
        return parse_row({"id": index, "image": item}, ("Row", index), Path(), prompt)
    raise TypeError(f"Row {index} of source must be a mapping, a path or a PIL image, not {_article(item)}.")


def _check_types(**arguments: Any) -> None:
    """Raise TypeError for an argument of the wrong type; models, which print pages, are named by their type."""
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "source": ((str, Path, Iterable), "a path, or an iterable of rows: mappings, paths or PIL images"),
        "prompt": ((str, type(None)), "a string or None"),
        "model": ((str, Path, PreTrainedModel, type(None)), "a folder, a hub id, a loaded model or None"),
        "recipe": ((Recipe, type(None)), "a Recipe, such as sparsight.recipe('vl-cache', budget=0.1), or None"),
        "device": ((str,), "a string"),
        "dtype": ((str,), "a string"),
    }
    for name, value in arguments.items():
        types, expected = kinds[name]
        if not isinstance(value, types) or (name == "source" and isinstance(value, Mapping | bytes)):
            raise TypeError(f"{name} must be {expected}, not {_article(value)}.")


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
