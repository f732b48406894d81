"""From the messages of a request to the model's inputs: checks on the event loop, the processor in worker threads."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from sparsight.models.families import FAMILIES
from sparsight.models.images import ImageError
from sparsight.models.inputs import apply_chat_template, check_image, special_tokens
from sparsight.models.layouts import Box, find_tiles
from sparsight.models.loading import Checkpoint
from sparsight.models.tile_places import place_tiles
from sparsight.server.errors import APIError
from sparsight.server.settings import Settings

WORKERS = 2

Inputs = Mapping[str, Any]


class Grid(NamedTuple):
    """A rectangle of an image that the model encodes as a grid of vision tokens.

    Attributes:
        name: the image, or the scale of the image.
        width: in pixels, as the model gets them.
        height: in pixels.
        positions: of the vision tokens in the prompt, int64 ``[rows, columns]``.
        image: which of the prompt's images it belongs to.
        box: left, top, right and bottom in the image as it was sent, as fractions of its sides; None where it is not
            known how the model cuts images.
    """

    name: str
    width: int
    height: int
    positions: Tensor
    image: int
    box: Box | None


class Prompt(NamedTuple):
    """What the model gets of a request.

    Attributes:
        inputs: what the processor returned.
        grids: of its images; empty where the layout is not known.
        field: of the request that it is from.
    """

    inputs: Inputs
    grids: Sequence[Grid] = ()
    field: str = "messages"

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.inputs["input_ids"].shape[1])


class Prompts:
    """Prepares the inputs of one model.

    Args:
        model: the model; only its config is used.
        processor: its processor.
        settings: the limits.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, settings: Settings) -> None:
        self.checkpoint = Checkpoint(str(model.name_or_path), model.config, processor)
        config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.vocabulary = int(config.vocab_size)
        self._settings = settings
        self._special = sorted(special_tokens(self.checkpoint))
        self._special_ids = frozenset(processor.tokenizer.convert_tokens_to_ids(self._special))
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="sparsight-prompts")

    def close(self) -> None:
        """Prepare no more."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def check_texts(self, texts: Mapping[str, str]) -> None:
        """Raise APIError if texts, by the names of their fields, are too long or spell a special token."""
        if sum(map(len, texts.values())) > self._settings.max_text:
            raise APIError(400, f"The request's texts must have at most {self._settings.max_text:,} characters in all.")
        for field, text in texts.items():
            for token in self._special:
                if token in text:
                    message = f"{field} must not spell {token!r}, which is a special token of the model."
                    raise APIError(400, message, param=field)

    async def from_messages(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """Inputs of a conversation in the processor's chat format, with PIL images.

        Raises:
            APIError: the model takes no conversations, or the processor refuses this one.
        """
        if not self.checkpoint.processor.chat_template:
            raise APIError(400, "The model has no chat template: use /v1/completions.", param="messages")
        return await self._run(self._conversation, messages)

    async def from_text(self, text: str) -> Prompt:
        """Inputs of a text without a chat template."""
        tokenizer = self.checkpoint.processor.tokenizer
        return await self._run(lambda: _of_tokens(tokenizer(text)["input_ids"]))

    def from_tokens(self, tokens: Sequence[int]) -> Prompt:
        """Inputs of token ids.

        Raises:
            APIError: the model does not have one of them, or one is a special token.
        """
        if max(tokens) >= self.vocabulary or not self._special_ids.isdisjoint(tokens):
            message = f"prompt must have token ids below {self.vocabulary}, none of them of a special token."
            raise APIError(400, message, param="prompt")
        return _of_tokens(tokens)

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        images = [part["image"] for part in parts if isinstance(part.get("image"), Image)]
        for image in images:
            check_image(self.checkpoint, image)
        inputs = apply_chat_template(self.checkpoint.processor, [list(messages)])
        return Prompt(inputs, self._grids(inputs, [image.size for image in images]))

    def _grids(self, inputs: Inputs, sizes: Sequence[tuple[int, int]]) -> list[Grid]:
        family = FAMILIES.get(self.checkpoint.config.model_type)
        if family is None or inputs.get("pixel_values") is None:
            return []
        try:
            tiles = find_tiles(family.layout, self.checkpoint.config, inputs)
        except ValueError:
            return []
        tiles = place_tiles(tiles, family.cut, self.checkpoint.processor.image_processor, sizes)
        return [
            Grid(tile.name, tile.pixels.shape[1], tile.pixels.shape[0], tile.tokens, tile.image, tile.box)
            for tile in tiles
        ]

    async def _run(self, prepare: Callable[..., Prompt], *arguments: Any) -> Prompt:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, prepare, *arguments)
        except ImageError as error:
            raise APIError(400, str(error), param="messages", code="invalid_image") from error
        except TemplateError as error:
            message = "The model's chat template refuses the conversation: its roles may have to alternate."
            raise APIError(400, message, param="messages") from error
        except (ValueError, TypeError) as error:
            raise APIError(400, "The model's processor refuses the request.") from error


def _of_tokens(tokens: Sequence[int]) -> Prompt:
    ids = torch.tensor([list(tokens)])
    return Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, field="prompt")
