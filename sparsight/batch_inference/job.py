"""A batch inference job, and how it runs on this machine."""

import hashlib
import json
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sparsight.batch_inference.generator import BatchGenerator
from sparsight.batch_inference.preprocessing import Preprocessor, preprocess_ahead
from sparsight.batch_inference.result import Result
from sparsight.batch_inference.rows import Row
from sparsight.cache.bounded_prefill import check_bound
from sparsight.compression.recipe import Recipe
from sparsight.models.images import MAX_PIXELS
from sparsight.models.loading import Checkpoint, load_model
from sparsight.reader import model_path


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
        prefill_bound: as :class:`~sparsight.CompressedCache` takes it.
        host_memory: as :class:`~sparsight.Engine` takes it. Up to rounding, the results do not depend on it.
        host_dtype: as :class:`~sparsight.Engine` takes it.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    max_new_tokens: int = 100
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_pixels: int = MAX_PIXELS
    prefill_bound: float | None = None
    host_memory: int = 0
    host_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("batch_size", self.batch_size)):
            is_none = name == "batch_size" and value is None
            if not is_none and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                or_none = " or None" if name == "batch_size" else ""
                raise ValueError(f"{name} must be an integer above 0{or_none}, got {value!r}.")
        if self.prefill_bound is not None:
            check_bound(self.prefill_bound, self.recipe)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the results, JSON serializable: equal settings give equal results."""
        recipe = json.loads(self.recipe.to_json())
        return {
            "sparsight": version("sparsight"),
            **_model_settings(self.checkpoint.name),
            "dtype": self.dtype,
            "method": recipe.pop("name"),
            **recipe,
            "max_new_tokens": self.max_new_tokens,
            "max_pixels": self.max_pixels,
            "prefill_bound": self.prefill_bound,
            "host_dtype": self.host_dtype,
        }

    @property
    def preprocessor(self) -> Preprocessor:
        """Makes the model's inputs from rows."""
        return Preprocessor(self.checkpoint, self.max_new_tokens, self.max_pixels)

    def generator(self, model: Any = None) -> BatchGenerator:
        """A generator of a loaded model, or of the checkpoint's, which is loaded if None.

        Raises:
            ValueError: the weights cannot be loaded.
        """
        if model is None:
            model = load_model(self.checkpoint, self.device, self.dtype)
        memory = self.prefill_bound, self.host_memory, self.host_dtype
        return BatchGenerator(model, self.preprocessor, self.recipe, self.batch_size, *memory)


def _model_settings(name: str) -> dict[str, str]:
    """What says which model it is: the shipped one has a name and its weights' hash, wherever it is installed."""
    if Path(name).resolve() != model_path().resolve():
        return {"model": name}
    weights = (model_path() / "model.safetensors").read_bytes()
    return {"model": "reader", "weights_sha256": hashlib.sha256(weights).hexdigest()}


def run_job(job: Job, rows: Iterable[Row], model: Any = None) -> Generator[list[Result], None, None]:
    """Results of all rows as soon as they are known, those that are known at the same time together.

    Args:
        job: the model and its settings.
        rows: the rows.
        model: the loaded model; loaded by the job if None.

    Raises:
        ValueError: the model cannot be loaded, or a process that opens images died.
    """
    with closing(preprocess_ahead(job.preprocessor, rows)) as preprocessed:
        # The workers start with the first row and preprocess while the weights are loaded.
        first = list(islice(preprocessed, 1))
        if first:
            with closing(job.generator(model)) as generator:
                yield from generator.generate(chain(first, preprocessed))
