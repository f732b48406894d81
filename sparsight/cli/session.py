"""From a command's options to a loaded model and its inputs; the weights are loaded last."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text
from transformers.feature_extraction_utils import BatchFeature

from sparsight.cli.terminal import console
from sparsight.models.images import open_image
from sparsight.models.inputs import check_length, prepare
from sparsight.models.loading import Checkpoint, load_checkpoint, load_model
from sparsight.models.prompt import locate
from sparsight.utils.text import escape


@dataclass(frozen=True)
class Question:
    """A prompt with its images, preprocessed for a model.

    Args:
        prompt: the text.
        checkpoint: the model that is to answer.
        inputs: what its processor returned.
        sizes: width and height of its images.
    """

    prompt: str
    checkpoint: Checkpoint
    inputs: BatchFeature
    sizes: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Session:
    """A loaded model and the inputs of one question.

    Args:
        model: the model.
        processor: its processor.
        inputs: the question, on the model's device and in its dtype.
    """

    model: Any
    processor: Any
    inputs: BatchFeature


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The text of ``--prompt`` or ``--prompt-file``, without trailing line breaks; None without either.

    Raises:
        ValueError: both are given, or the text cannot be read or is not UTF-8.
    """
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --prompt-file exclude each other.")
    if file is None and prompt != "-":
        return prompt
    name = "standard input" if file is None else file
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        return data.decode("utf-8-sig").rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"Cannot read the question from {name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"Cannot read the question from {name}: it is not UTF-8 text.") from error


def read_question(
    model: str, images: Sequence[str], prompt: str | None, max_pixels: int, max_new_tokens: int, *, quiet: bool
) -> Question:
    """Open the images and preprocess them and the prompt for a model.

    Raises:
        ValueError: an image, the model or the prompt cannot be used, or the prompt and an answer of ``max_new_tokens``
            exceed the model's context length.
    """
    if prompt is None:
        raise ValueError("There is no question: give --prompt or --prompt-file.")
    opened = [open_image(path, max_pixels) for path in images]
    with _status(f"Reading {model}", quiet):
        checkpoint = load_checkpoint(model)
        inputs = prepare(checkpoint, opened, prompt)
        locate(checkpoint.config, inputs)
        check_length(checkpoint.config, inputs, max_new_tokens)
    return Question(prompt, checkpoint, inputs, [image.size for image in opened])


def open_session(question: Question, device: str, dtype: str, *, quiet: bool) -> Session:
    """Load the weights of the question's model.

    Raises:
        ValueError: they cannot be loaded, or the device does not exist.
    """
    checkpoint = question.checkpoint
    with _status(f"Loading {checkpoint.name}", quiet):
        model = load_model(checkpoint, device, dtype)
    inputs = BatchFeature(dict(question.inputs)).to(model.device, model.dtype)
    return Session(model, checkpoint.processor, inputs)


def _status(text: str, quiet: bool) -> AbstractContextManager[Any]:
    """A spinner on stderr."""
    return nullcontext() if quiet else console(stderr=True).status(Text(escape(text)))
