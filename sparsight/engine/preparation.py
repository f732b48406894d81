"""Inputs of requests, prepared in threads of their own: images are opened and prompts tokenised."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.models.images import open_image
from sparsight.models.inputs import apply_chat_template, check_length, prepare
from sparsight.models.loading import Checkpoint

WORKERS = 2


class Preparation:
    """Prepares the model's inputs in worker threads.

    Args:
        model: the model; only its config is used.
        processor: its processor.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self._checkpoint = Checkpoint(str(model.name_or_path), model.config, processor)
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="sparsight")

    def submit(
        self,
        prompt: str | None,
        images: Sequence[Image | str | Path],
        messages: Sequence[Mapping[str, Any]] | None,
        inputs: Mapping[str, Any] | None,
        max_new_tokens: int,
    ) -> "Future[Mapping[str, Any]]":
        """The inputs of a request, which has one of ``prompt``, ``messages`` and ``inputs``.

        Raises:
            RuntimeError: it is closed.
        """
        return self._workers.submit(self._prepare, prompt, list(images), messages, inputs, max_new_tokens)

    def close(self) -> None:
        """Prepare no more."""
        self._workers.shutdown(cancel_futures=True)

    def _prepare(
        self,
        prompt: str | None,
        images: list[Image | str | Path],
        messages: Sequence[Mapping[str, Any]] | None,
        inputs: Mapping[str, Any] | None,
        max_new_tokens: int,
    ) -> Mapping[str, Any]:
        if messages is not None:
            inputs = apply_chat_template(self._checkpoint.processor, [list(messages)])
        elif prompt is not None:
            opened = [each if isinstance(each, Image) else open_image(each) for each in images]
            inputs = prepare(self._checkpoint, opened, prompt)
        assert inputs is not None
        check_length(self._checkpoint.config, inputs, max_new_tokens)
        return inputs


def to_device(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Inputs on a model's device, floating-point ones of its dtype."""
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        moved[name] = value
    return moved
