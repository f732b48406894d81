"""Loading checkpoints from a folder or the hub: config, processor, weights, device."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparsight.reader import model_path
from sparsight.utils.suggest import unknown
from sparsight.utils.text import first_sentence, printable, shorten

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types that weights can be loaded in. ``auto`` is the type they were saved in."""


@dataclass(frozen=True)
class Checkpoint:
    """A vision-language model without its weights.

    Args:
        name: a folder or a hub id.
        config: the model's config.
        processor: the model's processor.
    """

    name: str
    config: Any
    processor: Any

    def __reduce__(self) -> Any:
        """Pickle the name only: other processes load the checkpoint themselves."""
        return load_checkpoint, (self.name,)


def load(model: str | Path | None = None, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a vision-language model and its processor, ready to answer.

    ::

        model, processor = sparsight.load()

    Args:
        model: a folder or a hub id; the small model that ships with the package if None.
        device: a torch device, or ``auto``: the first GPU if there is one, else the CPU.
        dtype: one of :data:`DTYPES`.

    Returns:
        The unmodified transformers model, in evaluation mode, and its processor.

    Raises:
        ValueError: there is no such model, device or type, or the model is not a vision-language model.
    """
    checkpoint = load_checkpoint(str(model_path() if model is None else model))
    return load_model(checkpoint, device, dtype), checkpoint.processor


def load_checkpoint(name: str) -> Checkpoint:
    """Read the config and the processor of a folder or a hub id, not its weights.

    Raises:
        ValueError: there is no such model, or it is not a vision-language model.
    """
    shown = printable(name)
    # Unlike Path's methods, these take names of any length.
    is_path = os.path.exists(name) or name.startswith((".", "~", "/")) or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        raise ValueError(f"There is no model folder {shown}.")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # Loading raises OSError, ValueError, KeyError and more, from several libraries.
    except Exception as error:
        raise ValueError(f"{shown} is not a model that can be loaded: {first_sentence(error)}") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{shown} is a {config.model_type!r} model, not a vision-language model.")
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        hint = " Install it with pip install torchvision." if "torchvision" in str(error).lower() else ""
        raise ValueError(f"The processor of {shown} cannot be loaded: {first_sentence(error)}{hint}") from error
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{shown} has no processor for images.")
    return Checkpoint(name, config, processor)


def load_model(checkpoint: Checkpoint, device: str = "auto", dtype: str = "auto") -> Any:
    """Load the weights.

    Args:
        checkpoint: the model to load.
        device: a torch device, or ``auto``: the first GPU if there is one, else the CPU.
        dtype: one of :data:`DTYPES`.

    Raises:
        ValueError: the weights cannot be loaded, or there is no such device or type.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    device, shown = find_device(device), printable(checkpoint.name)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint.name, config=checkpoint.config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(f"The weights of {shown} cannot be loaded: {first_sentence(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"The weights of {shown} are incomplete: {len(missing)} are missing, {missing[0]} first.")
    return model.to(device).eval()


def find_device(name: str) -> str:
    """Resolve a device name; ``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"There is no device {shorten(name)!r}: {first_sentence(error)}") from error
    return name
