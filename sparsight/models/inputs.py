"""The model's inputs for a question: checks of what users give, chat template, tokens and pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image
from transformers.feature_extraction_utils import BatchFeature

from sparsight.models.families import FAMILIES
from sparsight.models.images import MAX_PIXELS, ImageError, check_sides
from sparsight.models.loading import Checkpoint
from sparsight.utils.text import first_sentence, is_unicode, printable


def prepare(checkpoint: Checkpoint, images: Sequence[Image], prompt: str) -> BatchFeature:
    """The model's inputs for one question about some images: ``input_ids`` ``[1, T]``, pixels and masks.

    The processor's chat template is applied. Without one, the image placeholders come first and the prompt follows.

    Raises:
        ValueError: :func:`check_text` or :func:`check_image` refuses the prompt or an image, or the processor does.
    """
    processor = checkpoint.processor
    check_text(checkpoint, prompt)
    for image in images:
        check_image(checkpoint, image)
    try:
        if processor.chat_template:
            return _with_template(processor, images, prompt)
        return _without_template(processor, images, prompt)
    except (ValueError, TypeError, TemplateError) as error:
        raise ValueError(
            f"The processor of {printable(checkpoint.name)} refuses the question: {first_sentence(error)}"
        ) from error


def check_text(checkpoint: Checkpoint, text: str) -> None:
    """Raise ValueError if a user's text contains a special token, or is not valid Unicode.

    Chat templates insert the text between special tokens of their own, and the tokenizer cannot distinguish them: text
    with ``</s>`` or ``<|user|>`` could end its turn or forge another one.
    """
    if not is_unicode(text):
        raise ValueError("The prompt is not valid Unicode.")
    for token in sorted(special_tokens(checkpoint)):
        if token in text:
            raise ValueError(
                f"The prompt must not spell {token!r}, which is a special token of the model: "
                "images are given as files, and turns are marked by the chat template."
            )


def check_image(checkpoint: Checkpoint, image: Image) -> None:
    """Raise ImageError if a processor would scale an image to an excessive size.

    Its sides may differ by a factor of :data:`sparsight.models.images.MAX_RATIO` at most. If the processor scales the
    short side to a fixed length, the result may have :data:`sparsight.models.images.MAX_PIXELS` pixels at most.
    """
    check_sides(image)
    size = dict(getattr(checkpoint.processor.image_processor, "size", None) or {})
    # With a longest edge the scaled size is bounded.
    if not size.get("shortest_edge") or size.get("longest_edge"):
        return
    scale = size["shortest_edge"] / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ImageError(
            "too many pixels",
            f"A picture of {image.width} x {image.height} would be scaled to {width:,} x {height:,}, more than the "
            f"limit of {MAX_PIXELS:,} pixels.",
        )


def check_length(config: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> None:
    """Raise ValueError unless a prompt and an answer of ``max_new_tokens`` fit into a model's context length.

    Args:
        config: the model's config.
        inputs: the processor's outputs: ``input_ids`` ``[B, T]``.
        max_new_tokens: the longest answer, in tokens.
    """
    length = inputs["input_ids"].shape[1]
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"The prompt has {length:,} tokens and the answer may have {max_new_tokens:,}, but the model takes "
            f"{limit:,} in all."
        )


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


def special_tokens(checkpoint: Checkpoint) -> set[str]:
    """Texts with a meaning for the tokenizer, the chat template, the processor or the model."""
    processor, config = checkpoint.processor, checkpoint.config
    tokenizer, template = processor.tokenizer, str(processor.chat_template)
    tokens = {getattr(processor, name, None) for name in ("image_token", "video_token")}
    family = FAMILIES.get(config.model_type)
    tokens.update(tokenizer.convert_ids_to_tokens(family.token_ids(config) if family else []))
    tokens.update(tokenizer.all_special_tokens)
    # Not every tokenizer lists the tokens that mark turns among its special ones.
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens.update(token.content for token in added if token.special or token.content in template)
    return {token for token in tokens if token and not token.isspace()}
