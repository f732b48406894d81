"""A request from its user's side: a handle that yields the text as it arrives, and the complete answers."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sparsight.cache.report import Report
from sparsight.engine.recall_log import Recalled
from sparsight.engine.sampling import Sampled


class RequestError(Exception):
    """A request that failed; the engine and all other requests go on."""


class OutOfMemoryError(RequestError):
    """A request for which there is not enough memory, now or at all."""


class Piece(NamedTuple):
    """What a new token added to an answer.

    Attributes:
        answer: which of the request's ``n`` answers.
        text: new text, complete characters only; may be empty.
        token: the token, or None where text that was held back follows the last one.
        time: when it was made, by ``time.perf_counter``.
    """

    answer: int
    text: str
    token: Sampled | None
    time: float


@dataclass(frozen=True)
class Completion:
    """One complete answer.

    Attributes:
        text: the answer, without special tokens and without the stop string.
        tokens: its tokens, the one that ended it included.
        finish_reason: ``stop`` (the model or a stop string ended it), ``length`` or ``aborted``.
        report: what the cache kept of the prompt.
        reused_tokens: prompt tokens that were not computed, since an earlier prompt had begun with them.
        prefill_seconds: time that the engine worked on the prompt, its own and all answers'.
        decode_seconds: time from the first token to the last.
    """

    text: str
    tokens: tuple[Sampled, ...]
    finish_reason: str
    report: Report
    reused_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens."""
        return [token.token_id for token in self.tokens]


class Handle:
    """A request that was given to an engine.

    Iterating over it, also asynchronously, yields :class:`Piece` by piece and lets the engine work where nobody else
    does; :meth:`wait` returns the complete answers.

    Args:
        number: how many answers there will be.
        drive: lets the engine work until there is something new for a handle.

    Attributes:
        error: why the request failed; its ``__cause__`` is the exception, except for lack of memory.
        started: whether an answer has a token.
        kept_positions: prompt positions that each KV head of a compressed layer keeps, int32 ``[H_kv, n]`` on the CPU,
            padded with -1; by number of the layer, if requested.
        recalled: what the KV heads hold of the prompt after each recall of the first answer, if requested.
        admitted: when the engine began with the prompt, by ``time.perf_counter``; None before.
    """

    def __init__(self, number: int, drive: Callable[["Handle"], None]) -> None:
        self._drive = drive
        self._pieces: deque[Piece] = deque()
        self._completions: list[Completion | None] = [None] * number
        self.error: RequestError | None = None
        self.aborted = self.started = False
        self.kept_positions: dict[int, Tensor] = {}
        self.recalled: list[Recalled] = []
        self.admitted: float | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or all(each is not None for each in self._completions)

    @property
    def has_news(self) -> bool:
        """Whether a piece waits to be read, or nothing more will come."""
        return bool(self._pieces) or self.done

    def __iter__(self) -> Iterator[Piece]:
        done = False
        while not done:
            # Before the pieces are read, as another thread may step in between.
            done = self.done
            while self._pieces:
                yield self._pieces.popleft()
            if not done:
                self._drive(self)
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        pieces = iter(self)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def take(self) -> list[Piece]:
        """The pieces that wait to be read, for a reader who lets the engine work otherwise."""
        return [self._pieces.popleft() for _ in range(len(self._pieces))]

    def wait(self) -> list[Completion]:
        """The complete answers, in order.

        Raises:
            RequestError: the request failed, in one sentence.
        """
        for _ in self:
            pass
        return self.completions

    @property
    def completions(self) -> list[Completion]:
        """The answers that are complete, in order."""
        return [each for each in self._completions if each is not None]

    @property
    def ended(self) -> Mapping[int, Completion]:
        """The answers that are complete, by their number."""
        return {index: each for index, each in enumerate(self._completions) if each is not None}

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    # For the engine

    def push(self, piece: Piece) -> None:
        """Hand a piece to the reader."""
        self._pieces.append(piece)
        self.started = True

    def complete(self, index: int, completion: Completion) -> None:
        """End one of the answers."""
        self._completions[index] = completion

    def fail(self, error: RequestError) -> None:
        """End the request."""
        self.error, self.aborted = self.error or error, True
