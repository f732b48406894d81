"""The answers to a request as the body of a response or as the events of a stream, in any of OpenAI's formats."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import BaseModel

from sparsight.engine.request import Completion, Piece
from sparsight.server.generation import Generation
from sparsight.server.schema import SamplingBody, StreamOptions, Usage, usage_of
from sparsight.server.service import Service

FinishReason = Literal["stop", "length"]


class Answers(ABC):
    """The answers to one request.

    Args:
        service: the service.
        body: the request.
        generation: its place.
    """

    def __init__(self, service: Service, body: SamplingBody, generation: Generation) -> None:
        self.generation, self.tokenizer = generation, service.engine.processor.tokenizer
        self.common: dict[str, Any] = {"id": generation.id, "created": generation.created, "model": service.name}
        self._options = body.stream_options or StreamOptions()

    @abstractmethod
    def complete(self) -> BaseModel:
        """The body of the response, when the answers are complete."""

    @abstractmethod
    def event(self, choices: list[BaseModel], **usage: Usage | None) -> BaseModel:
        """An event with what is new of some answers."""

    def opening(self, index: int) -> BaseModel | None:
        """What the first event of an answer has, if it comes before the first token."""
        return None

    @abstractmethod
    def piece(self, piece: Piece) -> BaseModel | None:
        """What an event has of a piece; None if there is nothing to send."""

    @abstractmethod
    def closing(self, index: int, reason: FinishReason) -> BaseModel:
        """What the last event of an answer has."""

    async def events(self) -> AsyncIterator[BaseModel]:
        """The events of a stream.

        Raises:
            APIError: the request failed.
        """
        for index in range(self.generation.params.n):
            if opening := self.opening(index):
                yield self._event(opening)
        closed: set[int] = set()
        while pieces := await self.generation.pieces():
            # Read at once: more may arrive while events are sent.
            ended = self.generation.ended
            for piece in pieces:
                if choice := self.piece(piece):
                    yield self._event(choice)
            # The last ones end with the request.
            if len(ended) < self.generation.params.n:
                for index in sorted(ended.keys() - closed):
                    closed.add(index)
                    yield self._event(self.closing(index, finish_reason(ended[index])))
        for index, answer in enumerate(self.generation.completions):
            if index not in closed:
                yield self._event(self.closing(index, finish_reason(answer)))
        if self._options.include_usage:
            yield self.event([], usage=self.usage(complete=True))

    def usage(self, *, complete: bool) -> Usage:
        """Tokens so far, and what the cache kept if the answers are complete."""
        generation = self.generation
        answer = generation.completions[0] if complete else None
        return usage_of(generation.prompt_tokens, generation.new_tokens, answer)

    def _event(self, choice: BaseModel) -> BaseModel:
        if not self._options.include_usage:
            return self.event([choice])
        return self.event([choice], usage=self.usage(complete=False) if self._options.continuous_usage_stats else None)


def finish_reason(answer: Completion) -> FinishReason:
    """Why an answer has ended."""
    return "length" if answer.finish_reason == "length" else "stop"
