"""Conversations of all endpoints: their limits, their images, and the processor's chat format."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import Request

from sparsight.server.errors import APIError
from sparsight.server.prompts import Prompt
from sparsight.server.schema import ImageBody
from sparsight.server.service import Service


def check_messages(service: Service, messages: Sequence[Any], field: str) -> dict[str, str]:
    """The texts of messages, by the names of their fields.

    Args:
        service: its settings have the limits.
        messages: have a ``role`` and ``content``, which is a string or a list of images and parts with ``text``.
        field: the field of the request that has them.

    Raises:
        APIError: there are too many messages or images.
    """
    settings, texts = service.settings, {}
    if len(messages) > settings.max_messages:
        raise APIError(400, f"{field} must have at most {settings.max_messages} items.", param=field)
    if len(_links(messages)) > settings.max_images:
        raise APIError(400, f"{field} must have at most {settings.max_images} images.", param=field)
    for number, message in enumerate(messages):
        name = f"{field}[{number}].content"
        if isinstance(message.content, str):
            texts[name] = message.content
        else:
            parts = enumerate(message.content)
            texts |= {f"{name}[{index}].text": part.text for index, part in parts if not isinstance(part, ImageBody)}
    return texts


def check_texts(request: Request, texts: dict[str, str]) -> None:
    """Raise APIError if texts, by the names of their fields, cannot be used; log them if the operator wants that."""
    service: Service = request.app.state.service
    service.prompts.check_texts(texts)
    if service.settings.log_prompts:
        request.state.log["prompt"] = list(texts.values())


async def load(service: Service, messages: Sequence[Any]) -> Prompt:
    """The prompt of messages that have been checked. Raises APIError."""
    images = await asyncio.gather(*map(service.images.load, _links(messages)))
    return await service.prompts.from_messages(_chat(messages, iter(images)))


def _links(messages: Iterable[Any]) -> list[str]:
    parts = [part for message in messages if not isinstance(message.content, str) for part in message.content]
    return [part.link for part in parts if isinstance(part, ImageBody)]


def _chat(messages: Iterable[Any], images: Any) -> list[dict[str, Any]]:
    """Messages in the processor's chat format, with the images in their order."""
    chat = []
    for message in messages:
        content = [message.content] if isinstance(message.content, str) else message.content
        parts: list[dict[str, Any]] = []
        for part in content:
            if isinstance(part, ImageBody):
                parts.append({"type": "image", "image": next(images)})
            else:
                parts.append({"type": "text", "text": part if isinstance(part, str) else part.text})
        # OpenAI's newer name, which templates do not know.
        role = "system" if message.role == "developer" else message.role
        chat.append({"role": role, "content": parts})
    return chat
