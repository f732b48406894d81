"""Loading checkpoints from a folder or the hub: config, processor, weights, device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparsight.utils.suggest import unknown
from sparsight.utils.text import first_sentence

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


def load_checkpoint(name: str) -> Checkpoint:
    """Read the config and the processor of a folder or a hub id, not its weights.

    Raises:
        ValueError: there is no such model, or it is not a vision-language model.
    """
    is_path = Path(name).exists() or name.startswith((".", "~", "/")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ValueError(f"There is no model folder {name}.")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # Loading raises OSError, ValueError, KeyError and more, from several libraries.
    except Exception as error:
        raise ValueError(f"{name} is not a model that can be loaded: {first_sentence(error)}") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{name} is a {config.model_type!r} model, not a vision-language model.")
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        hint = " Install it with pip install torchvision." if "torchvision" in str(error).lower() else ""
        raise ValueError(f"The processor of {name} cannot be loaded: {first_sentence(error)}{hint}") from error
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{name} has no processor for images.")
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
    device = find_device(device)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint.name, config=checkpoint.config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(f"The weights of {checkpoint.name} cannot be loaded: {first_sentence(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"The weights of {checkpoint.name} are incomplete: {len(missing)} are missing, {missing[0]} first."
        )
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
        raise ValueError(f"There is no device {name!r}: {first_sentence(error)}") from error
    return name
