"""Checkpoints from a folder or the hub, and the inputs that they take for pictures and a question."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL.Image import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparsight.models.families import FAMILIES
from sparsight.utils.suggest import unknown

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types that weights can be loaded in; ``auto`` is the type that they were saved in."""


@dataclass(frozen=True)
class Checkpoint:
    """A vision-language model by name, with everything but its weights.

    Args:
        name: folder, or id on the hub.
        config: the model's config.
        processor: the model's processor.
    """

    name: str
    config: Any
    processor: Any

    def __reduce__(self) -> Any:
        """Other processes and machines are told the name."""
        return load_checkpoint, (self.name,)


def load_checkpoint(name: str) -> Checkpoint:
    """Read the config and the processor of a folder or a hub id, not its weights.

    Raises:
        ValueError: there is none, or it is not a vision-language model.
    """
    is_path = Path(name).exists() or name.startswith((".", "~", "/")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ValueError(f"There is no model folder {name}.")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # Loading raises OSError, ValueError, KeyError and more, from several libraries, about whatever is wrong with it.
    except Exception as error:
        raise ValueError(f"{name} is not a model that can be loaded: {_first_sentence(error)}") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{name} is a {config.model_type!r} model, not a vision-language model.")
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        hint = " Install it with pip install torchvision." if "torchvision" in str(error).lower() else ""
        raise ValueError(f"The processor of {name} cannot be loaded: {_first_sentence(error)}{hint}") from error
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{name} has no processor for images.")
    return Checkpoint(name, config, processor)


def load_model(checkpoint: Checkpoint, device: str = "auto", dtype: str = "auto") -> Any:
    """Load the weights.

    Args:
        checkpoint: what to load.
        device: a torch device, or ``auto``: the first GPU if there is one.
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
        raise ValueError(f"The weights of {checkpoint.name} cannot be loaded: {_first_sentence(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"The weights of {checkpoint.name} are incomplete: {len(missing)} are missing, {missing[0]} first."
        )
    return model.to(device).eval()


def find_device(name: str) -> str:
    """A torch device by name; ``auto`` is the first GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"There is no device {name!r}: {_first_sentence(error)}") from error
    return name


def prepare(checkpoint: Checkpoint, images: Sequence[Image], prompt: str) -> BatchFeature:
    """The model's inputs for one question about some pictures, ``input_ids`` ``[1, T]`` and what belongs to them.

    The chat template of the processor is applied; without one the prompt follows the images' placeholders.

    Raises:
        ValueError: the prompt spells a placeholder of the model, or the processor refuses it or a picture.
    """
    processor = checkpoint.processor
    for placeholder in _placeholders(checkpoint):
        if placeholder in prompt:
            raise ValueError(
                f"The prompt must not spell {placeholder!r}, which stands for a picture here: "
                "pictures are given as files and placed before the prompt."
            )
    try:
        if processor.chat_template:
            return _with_template(processor, images, prompt)
        return _without_template(processor, images, prompt)
    except (ValueError, TypeError, TemplateError) as error:
        raise ValueError(
            f"The processor of {checkpoint.name} refuses the question: {_first_sentence(error)}"
        ) from error


def templated(processor: Any, conversations: Sequence[Any]) -> BatchFeature:
    """The model's inputs for conversations whose next answer is asked for, padded where the tokenizer pads.

    Args:
        processor: with a chat template.
        conversations: lists of messages, ``{"role": ..., "content": [...]}``, pictures among the content.
    """
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def _with_template(processor: Any, images: Sequence[Image], prompt: str) -> BatchFeature:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return templated(processor, [[{"role": "user", "content": content}]])


def _without_template(processor: Any, images: Sequence[Image], prompt: str) -> BatchFeature:
    text = f"{processor.image_token}\n" * len(images) + prompt if images else prompt
    return processor(images=list(images) or None, text=text, return_tensors="pt")


def _placeholders(checkpoint: Checkpoint) -> set[str]:
    """Texts that the processor or the tokenizer takes for a piece of a picture or a video."""
    processor, config = checkpoint.processor, checkpoint.config
    texts = {getattr(processor, name, None) for name in ("image_token", "video_token")}
    family = FAMILIES.get(config.model_type)
    texts.update(processor.tokenizer.convert_ids_to_tokens(family.token_ids(config) if family else []))
    return {text for text in texts if text}


def _first_sentence(error: BaseException) -> str:
    """What an error says first, as one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". ")[0].rstrip(".") + "."
