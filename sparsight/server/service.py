"""What the endpoints share."""

import time
import uuid
from typing import Any

from sparsight.engine.engine import Engine
from sparsight.server.engine_loop import EngineLoop
from sparsight.server.errors import RETRY_SECONDS, APIError, stopping
from sparsight.server.generation import Generation
from sparsight.server.images import ImageLoader
from sparsight.server.kept import KeptStore
from sparsight.server.metrics import Metrics
from sparsight.server.prompts import Prompts
from sparsight.server.schema import SamplingBody
from sparsight.server.settings import Settings


class Service:
    """The engine's loop, the limits and the requests that have not ended.

    Args:
        engine: the engine; the service steps and closes it.
        name: what the model is called.
        settings: the limits.
        images: opens the images of requests.
    """

    def __init__(self, engine: Engine, name: str, settings: Settings, images: ImageLoader) -> None:
        self.engine, self.name, self.settings, self.images = engine, name, settings, images
        self.loop = EngineLoop(engine)
        self.prompts = Prompts(engine.model, engine.processor, settings)
        self.generation_config: Any = engine.model.generation_config
        self.kept = KeptStore(settings.kept_requests)
        self.draining = False
        self.created = int(time.time())
        self.active: set[Generation] = set()
        self.metrics = Metrics(engine, self.active)

    @property
    def waiting(self) -> int:
        """Requests without a token so far."""
        return sum(not each.started for each in self.active)

    def accept(self, prefix: str, key_id: str | None) -> Generation:
        """A place for a request, which the caller closes.

        Args:
            prefix: what the request's id begins with.
            key_id: of the API key that it came with.

        Raises:
            APIError: the server stops, or too many requests wait.
        """
        self.check_queue()
        return Generation(self, f"{prefix}-{uuid.uuid4().hex}", key_id)

    def check_queue(self) -> None:
        """Raise APIError if the server stops, or too many requests wait."""
        if self.draining or self.loop.failed:
            raise stopping()
        if self.waiting >= self.settings.max_queue:
            message = f"The server is busy: {self.settings.max_queue} requests are waiting."
            raise APIError(503, message, kind="server_error", code="overloaded", retry_after=RETRY_SECONDS)

    def check_model(self, name: str) -> None:
        """Raise APIError unless the server has this model."""
        if name != self.name:
            raise APIError(404, f"The model must be {self.name!r}.", param="model", code="model_not_found")

    def check_sampling(self, body: SamplingBody, longest: int | None) -> None:
        """Raise APIError if a value exceeds a limit of the server or the model."""
        most, vocabulary = min(self.settings.max_answers, self.engine.max_running), self.prompts.vocabulary
        if body.n is not None and body.n > most:
            raise APIError(400, f"n must be at most {most}.", param="n")
        if longest is not None and longest > self.settings.max_new_tokens:
            name = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
            raise APIError(400, f"{name} must be at most {self.settings.max_new_tokens}.", param=name)
        if body.logit_bias and max(map(int, body.logit_bias)) >= vocabulary:
            raise APIError(400, f"logit_bias must have token ids below {vocabulary}.", param="logit_bias")
        if body.stream_options is not None and not body.stream:
            raise APIError(400, "stream_options needs stream.", param="stream_options")

    def start(self) -> None:
        """Start to generate; called on the event loop."""
        self.loop.start()

    def stop(self) -> None:
        """End all requests."""
        self.prompts.close()
        self.loop.stop()
