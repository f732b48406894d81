"""The model's inputs for a question: chat template, image placeholders, tokens and pixels."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image
from transformers.feature_extraction_utils import BatchFeature

from sparsight.models.families import FAMILIES
from sparsight.models.loading import Checkpoint
from sparsight.utils.text import first_sentence


def prepare(checkpoint: Checkpoint, images: Sequence[Image], prompt: str) -> BatchFeature:
    """The model's inputs for one question about some images: ``input_ids`` ``[1, T]``, pixels and masks.

    The processor's chat template is applied. Without one, the image placeholders come first and the prompt follows.

    Raises:
        ValueError: the prompt contains a placeholder of the model, or the processor rejects the prompt or an image.
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
        raise ValueError(f"The processor of {checkpoint.name} refuses the question: {first_sentence(error)}") from error


def apply_chat_template(processor: Any, conversations: Sequence[Any]) -> BatchFeature:
    """The model's inputs for conversations that continue with an answer, padded on the tokenizer's padding side.

    Args:
        processor: a processor with a chat template.
        conversations: lists of messages ``{"role": ..., "content": [...]}``, with images in the content.
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
    return apply_chat_template(processor, [[{"role": "user", "content": content}]])


def _without_template(processor: Any, images: Sequence[Image], prompt: str) -> BatchFeature:
    text = f"{processor.image_token}\n" * len(images) + prompt if images else prompt
    return processor(images=list(images) or None, text=text, return_tensors="pt")


def _placeholders(checkpoint: Checkpoint) -> set[str]:
    """Strings that the processor or the tokenizer takes for part of an image or a video."""
    processor, config = checkpoint.processor, checkpoint.config
    texts = {getattr(processor, name, None) for name in ("image_token", "video_token")}
    family = FAMILIES.get(config.model_type)
    texts.update(processor.tokenizer.convert_ids_to_tokens(family.token_ids(config) if family else []))
    return {text for text in texts if text}
