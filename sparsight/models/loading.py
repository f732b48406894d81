"""Loading checkpoints from a folder or the hub: config, processor, weights, device."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME

from sparsight.models.install import NAMES, checkpoint_folder
from sparsight.reader import model_path
from sparsight.utils.suggest import unknown
from sparsight.utils.text import first_sentence, printable, shorten

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types that weights can be loaded in. ``auto`` is the type they were saved in."""


@dataclass(frozen=True)
class Checkpoint:
    """A model without its weights.

    Args:
        name: a folder, a hub id, or a name that ``sparsight models --install`` takes.
        config: the model's config.
        processor: the model's processor; the tokenizer of a model without images.
    """

    name: str
    config: Any
    processor: Any

    @property
    def text_only(self) -> bool:
        """Whether it is a language model without images."""
        return self.config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    def __reduce__(self) -> Any:
        """Pickle the name only: other processes load the checkpoint themselves."""
        return load_checkpoint, (self.name, self.text_only)


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


def load_checkpoint(name: str, text: bool = False) -> Checkpoint:
    """Read a model's config and processor, not its weights.

    Args:
        name: a folder, a hub id, or a name that ``sparsight models --install`` takes.
        text: whether it may be a language model without images.

    Raises:
        ValueError: there is no such model, or it is neither a vision-language model nor one that ``text`` allows.
    """
    shown, name = printable(name), _installed(name)
    # Unlike Path's methods, these take names of any length.
    is_path = os.path.exists(name) or name.startswith((".", "~", "/")) or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        raise ValueError(f"There is no model folder {shown}.")
    if not is_path:
        _check_hub(name, shown)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # Loading raises OSError, ValueError, KeyError and more, from several libraries.
    except Exception as error:
        raise ValueError(f"{shown} is not a model that can be loaded: {first_sentence(error)}") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        if text and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return Checkpoint(name, config, _read(AutoTokenizer, "tokenizer", name, shown))
        wanted = "vision-language or language model" if text else "vision-language model"
        raise ValueError(f"{shown} is a {config.model_type!r} model, not a {wanted}.")
    processor = _read(AutoProcessor, "processor", name, shown)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{shown} has no processor for images.")
    return Checkpoint(name, config, processor)


def _check_hub(name: str, shown: str) -> None:
    """Raise ValueError if a model is neither in the hub's cache nor on the hub; transformers would retry for 20 s."""
    try:
        if try_to_load_from_cache(name, CONFIG_NAME) is not None or file_exists(name, CONFIG_NAME):
            return
    except (HFValidationError, HfHubHTTPError):
        # The hub was reached or need not be; transformers says what is wrong.
        return
    except Exception as error:
        raise ValueError(
            f"There is no folder {shown}, and the Hugging Face Hub cannot be reached: {first_sentence(error)}"
        ) from error
    raise ValueError(f"There is neither a folder {shown} nor a public model of that name on the Hugging Face Hub.")


def _installed(name: str) -> str:
    """The folder of a model that was installed by name; other names are unchanged."""
    if name not in NAMES or os.path.isdir(name):
        return name
    folder = checkpoint_folder(name)
    if not folder.is_dir():
        raise ValueError(f"{name} is not installed: `sparsight models --install {name}` does it.")
    return str(folder)


def _read(auto: Any, what: str, name: str, shown: str) -> Any:
    """A model's processor or tokenizer."""
    try:
        return auto.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        hint = " Install it with pip install torchvision." if "torchvision" in str(error).lower() else ""
        raise ValueError(f"The {what} of {shown} cannot be loaded: {first_sentence(error)}{hint}") from error


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
    auto: Any = AutoModelForCausalLM if checkpoint.text_only else AutoModelForImageTextToText
    try:
        loaded: Any = auto.from_pretrained(
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
