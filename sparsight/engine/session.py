"""A conversation with an engine, for notebooks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from sparsight.cache.report import Report
from sparsight.engine.request import Completion
from sparsight.models.images import open_image

if TYPE_CHECKING:
    from sparsight.engine.engine import Engine


class Session:
    """Questions about some images, each with the conversation before it.

    Every question is a request of its own with all messages so far. With the engine's ``host_memory`` only what is new
    is computed; without, everything is computed again.

    Args:
        engine: answers the questions. Its processor has a chat template.
        images: PIL images or paths, which come with the first question.
        request: further arguments of :meth:`sparsight.Engine.add`, for every question.

    Attributes:
        messages: the conversation so far.

    Raises:
        ImageError: an image cannot be read.
    """

    def __init__(self, engine: "Engine", images: Sequence[Image | str | Path] = (), **request: Any) -> None:
        self._engine, self._request = engine, request
        self._images = [each if isinstance(each, Image) else open_image(each) for each in images]
        self._report: Report | None = None
        self.messages: list[dict[str, Any]] = []

    def ask(self, question: str, images: Sequence[Image | str | Path] = ()) -> Completion:
        """The answer to the next question.

        Args:
            question: its text.
            images: further images, which come with it.

        Raises:
            RequestError: it failed; the conversation is as it was before.
        """
        opened = [*self._images, *(each if isinstance(each, Image) else open_image(each) for each in images)]
        content = [*({"type": "image", "image": image} for image in opened), {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        completion = self._engine.add(messages=messages, **self._request).wait()[0]
        said = {"role": "assistant", "content": [{"type": "text", "text": completion.text}]}
        self.messages, self._images, self._report = [*messages, said], [], completion.report
        return completion

    def report(self) -> Report:
        """What the cache kept of the conversation for the newest answer.

        Raises:
            ValueError: nothing has been answered yet.
        """
        if self._report is None:
            raise ValueError("The session has no answer yet: ask a question first.")
        return self._report
