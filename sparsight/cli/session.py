"""From a command's options to a loaded model and its inputs; the weights are loaded last."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.feature_extraction_utils import BatchFeature

from sparsight.models.images import open_image
from sparsight.models.loading import Checkpoint, load_checkpoint, load_model, prepare
from sparsight.models.prompt import locate


@dataclass(frozen=True)
class Question:
    """A prompt with its images, preprocessed for a model.

    Args:
        checkpoint: the model that is to answer.
        inputs: what its processor returned.
    """

    checkpoint: Checkpoint
    inputs: BatchFeature


@dataclass(frozen=True)
class Session:
    """A loaded model and the inputs of one question.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        inputs: the question, on the model's device and in its dtype.
    """

    model: Any
    tokenizer: Any
    inputs: BatchFeature


def read_question(model: str, images: Sequence[Path], prompt: str, max_pixels: int) -> Question:
    """Open the images and preprocess them and the prompt for a model.

    Raises:
        ValueError: an image, the model or the prompt cannot be used.
    """
    opened = [open_image(path, max_pixels) for path in images]
    with _status(f"Reading {model}"):
        checkpoint = load_checkpoint(model)
        inputs = prepare(checkpoint, opened, prompt)
        locate(checkpoint.config, inputs)
    return Question(checkpoint, inputs)


def open_session(question: Question, device: str, dtype: str) -> Session:
    """Load the weights of the question's model.

    Raises:
        ValueError: they cannot be loaded, or the device does not exist.
    """
    checkpoint = question.checkpoint
    with _status(f"Loading {checkpoint.name}"):
        model = load_model(checkpoint, device, dtype)
    inputs = BatchFeature(dict(question.inputs)).to(model.device, model.dtype)
    return Session(model, checkpoint.processor.tokenizer, inputs)


def _status(text: str) -> Any:
    """A spinner on stderr."""
    return Console(stderr=True).status(text)
