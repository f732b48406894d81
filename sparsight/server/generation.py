"""One request from its acceptance to its end, whichever endpoint it came to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsight.compression.recipe import Recipe
from sparsight.engine.request import Completion, Handle, OutOfMemoryError, Piece, RequestError
from sparsight.engine.sampling import SamplingParams
from sparsight.server.engine_loop import EngineError, Stream, logger
from sparsight.server.errors import RETRY_SECONDS, APIError, stopping
from sparsight.server.kept import Kept
from sparsight.server.metrics import Observation
from sparsight.server.prompts import Grid, Prompt

if TYPE_CHECKING:
    from sparsight.server.service import Service


class Generation:
    """One request: a place in the queue, then in the engine.

    Attributes:
        id: what the response is called.
        created: seconds since the epoch.
        params: how it is sampled, once it has begun.
        recipe: how its prompt is compressed, once it has begun.
        prompt_tokens: length of its prompt.
        new_tokens: tokens generated so far, all answers together.
        log: what the access log says of the request.
        end_token_ids: tokens that end an answer and have no text.
    """

    def __init__(self, service: Service, id: str, key_id: str | None) -> None:
        self._service, self.id, self._key_id = service, id, key_id
        self._stream: Stream | None = None
        self._grids: Sequence[Grid] = ()
        self._characters: list[int] = []
        self.created = int(time.time())
        self.started = False
        self.params = SamplingParams()
        self.recipe = service.engine.recipe
        self.prompt_tokens = self.new_tokens = 0
        self.end_token_ids: frozenset[int] = frozenset()
        self.log: dict[str, Any] = {}
        self._observation = Observation(service.metrics)
        service.active.add(self)

    async def begin(self, prompt: Prompt, recipe: Recipe, longest: int | None, sampling: Mapping[str, Any]) -> None:
        """Give the request to the engine and wait for its first token.

        Args:
            prompt: the prompt.
            recipe: how the prompt is compressed.
            longest: most tokens of an answer; as many as the limit and the model's context allow if None.
            sampling: further arguments of :class:`SamplingParams`, in place of the model's own.

        Raises:
            APIError: the request does not fit, or it failed.
        """
        service = self._service
        self.prompt_tokens, self.recipe = prompt.length, recipe
        longest = self._longest(longest, prompt.field)
        self.params = SamplingParams.from_generation_config(
            service.generation_config, max_new_tokens=longest, **sampling
        )
        self.end_token_ids = self.params.end_token_ids(service.generation_config)
        self._check_memory()
        keep_positions = bool(prompt.grids and service.settings.kept_requests)
        # Whether another client has sent an image must not show in the time to the first token.
        salt = self._key_id or ""
        self._stream = service.loop.submit(prompt.inputs, recipe, self.params, keep_positions, salt)
        self._grids = prompt.grids
        await self._stream.arrival()
        self.started = True
        if self._stream.handle.error is not None and not self._stream.handle.started:
            raise _failure(self._stream.handle)

    async def pieces(self) -> list[Piece]:
        """What was generated since the last call; empty at the end.

        Raises:
            APIError: the request failed, or was ended by the server.
        """
        assert self._stream is not None
        try:
            pieces = await self._stream.next()
        except RequestError as error:
            raise _failure(self._stream.handle) from error
        if not pieces and any(each.finish_reason == "aborted" for each in self._stream.completions):
            raise stopping()
        if not pieces and self._stream.handle.kept_positions:
            report, handle = self.completions[0].report, self._stream.handle
            found = handle.kept_positions, handle.recalled, self._characters
            self._service.kept.add(self.id, Kept(self._key_id, report, self._grids, *found))
        for piece in pieces:
            if piece.answer == 0 and piece.token is not None:
                self._characters.append(len(piece.text))
            elif piece.answer == 0:
                self._characters[-1] += len(piece.text)
        self._count(self._stream, pieces)
        return pieces

    def _count(self, stream: Stream, pieces: Sequence[Piece]) -> None:
        self.new_tokens += sum(piece.token is not None for piece in pieces)
        self._observation.pieces(stream.handle, pieces)

    async def finish(self) -> list[Completion]:
        """The complete answers.

        Raises:
            APIError: as :meth:`pieces`.
        """
        assert self._stream is not None
        self._stream.each_step = False
        while await self.pieces():
            pass
        return self.completions

    @property
    def completions(self) -> list[Completion]:
        """The complete answers, in order."""
        assert self._stream is not None
        return self._stream.completions

    @property
    def ended(self) -> Mapping[int, Completion]:
        """The complete answers all of whose pieces have arrived, by their number."""
        assert self._stream is not None
        return self._stream.ended

    @property
    def queued(self) -> bool:
        """Whether its prompt is not being processed yet."""
        return self._stream is None or self._stream.handle.admitted is None

    def abort(self) -> None:
        """End the request where it is."""
        if self._stream is not None and not self._stream.done:
            self._service.loop.abort(self._stream)

    def close(self) -> None:
        """Give the place back; a request that has not ended is aborted."""
        self.abort()
        self._service.active.discard(self)
        if self._stream is not None:
            # Of a complete answer that nobody waits for any more.
            self._count(self._stream, self._service.loop.take(self._stream))
            reasons = self._observation.end(self._stream.handle, self.params.n, self.prompt_tokens)
            self.log |= {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new_tokens}
            self.log |= {"finish_reason": ",".join(dict.fromkeys(reasons))}

    def _longest(self, requested: int | None, field: str) -> int:
        limit, context = self._service.settings.max_new_tokens, self._service.prompts.context
        room = math.inf if context is None else context - self.prompt_tokens
        if room < (requested or 1):
            message = (
                f"The prompt has {self.prompt_tokens:,} tokens and the answer may have {requested or 1:,}, but the "
                f"model's context has {context:,}."
            )
            raise APIError(400, message, param=field, code="context_length_exceeded")
        return int(min(limit, room)) if requested is None else requested

    def _check_memory(self) -> None:
        try:
            self._service.engine.memory_needed(self.recipe, self.prompt_tokens, self.params)
        except OutOfMemoryError as error:
            message = (
                "The request needs more KV memory than the server has: ask for a shorter answer, fewer answers, a "
                "smaller budget or a method that does not recall."
            )
            raise APIError(400, message, code="kv_memory_exceeded") from error


def _failure(handle: Handle) -> APIError:
    """What a client is told of a request that failed."""
    error = handle.error
    cause = None if error is None else error.__cause__
    if isinstance(error, OutOfMemoryError):
        message = "The server has not enough memory for the request now."
        return APIError(503, message, kind="server_error", code="out_of_memory", retry_after=RETRY_SECONDS)
    # Recipes and prompts are checked when the engine begins with them.
    if isinstance(cause, ValueError) and not handle.started:
        return APIError(400, "The request cannot be processed with this model and method.")
    if cause is None and not isinstance(error, EngineError):
        return stopping()
    logger.error("A request failed.", exc_info=cause)
    return APIError(500, "The model failed on the request.", kind="server_error")
