"""From a command's options to a model that is ready to answer; weights are loaded last."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.feature_extraction_utils import BatchFeature

from sparsight.models.images import open_image
from sparsight.models.inputs import prepare
from sparsight.models.loading import Checkpoint, load_checkpoint, load_model
from sparsight.models.prompt import locate


@dataclass(frozen=True)
class Question:
    """A prompt with its pictures.

    Args:
        checkpoint: the model that is asked.
        inputs: what its processor returned.
    """

    checkpoint: Checkpoint
    inputs: BatchFeature


@dataclass(frozen=True)
class Session:
    """A model and a question for it.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        inputs: the question, on the model's device and in its type.
    """

    model: Any
    tokenizer: Any
    inputs: BatchFeature


def read_question(model: str, images: Sequence[Path], prompt: str, max_pixels: int) -> Question:
    """Open the pictures and make a model's inputs of them and the prompt.

    Raises:
        ValueError: something is wrong with a picture, the model or the prompt.
    """
    pictures = [open_image(path, max_pixels) for path in images]
    with _status(f"Reading {model}"):
        checkpoint = load_checkpoint(model)
        inputs = prepare(checkpoint, pictures, prompt)
        locate(checkpoint.config, inputs)
    return Question(checkpoint, inputs)


def open_session(question: Question, device: str, dtype: str) -> Session:
    """Load the model that a question is for.

    Raises:
        ValueError: it cannot be loaded, or the device does not exist.
    """
    checkpoint = question.checkpoint
    with _status(f"Loading {checkpoint.name}"):
        model = load_model(checkpoint, device, dtype)
    inputs = BatchFeature(dict(question.inputs)).to(model.device, model.dtype)
    return Session(model, checkpoint.processor.tokenizer, inputs)


def _status(text: str) -> Any:
    """A sign on stderr that something takes a while."""
    return Console(stderr=True).status(text)
