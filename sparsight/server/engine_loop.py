"""The thread that steps the engine, and streams that hand what it generates to an event loop."""

import asyncio
import logging
import threading
from collections.abc import Mapping
from typing import Any

from sparsight.compression.recipe import Recipe
from sparsight.engine.engine import Engine
from sparsight.engine.request import Completion, Handle, Piece, RequestError
from sparsight.engine.sampling import SamplingParams

logger = logging.getLogger("sparsight.server")


class EngineError(RequestError):
    """The engine failed, and with it all requests."""


class Stream:
    """The pieces of one request, for one reader on the event loop.

    Args:
        handle: the engine's handle of the request.

    Attributes:
        each_step: whether the reader is woken after each step, or only at the end.
        ended: the complete answers all of whose pieces have arrived, by their number.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.each_step = True
        self._pieces: list[Piece] = []
        self.ended: Mapping[int, Completion] = {}
        self._done = False
        self._arrived = asyncio.Event()

    async def arrival(self) -> None:
        """Wait until :meth:`next` returns at once."""
        await self._arrived.wait()

    async def next(self) -> list[Piece]:
        """The pieces that have arrived since the last call, at least one; none after the last.

        Raises:
            RequestError: the request failed.
        """
        await self._arrived.wait()
        pieces, self._pieces = self._pieces, []
        if not pieces and self.handle.error is not None:
            raise self.handle.error
        if not self._done:
            self._arrived.clear()
        return pieces

    @property
    def done(self) -> bool:
        """Whether nothing more will arrive."""
        return self._done

    @property
    def completions(self) -> list[Completion]:
        """The complete answers, in order."""
        return self.handle.completions

    @property
    def has_news(self) -> bool:
        """Whether the reader is to be woken."""
        return self.handle.has_news if self.each_step else self.handle.done

    def deliver(self, pieces: list[Piece], ended: Mapping[int, Completion], done: bool) -> None:
        """Take new pieces; called on the event loop."""
        self._pieces += pieces
        self.ended = ended
        self._done = done
        self._arrived.set()


class EngineLoop:
    """Steps an engine in one thread while it has work; the thread sleeps otherwise.

    A step wakes the event loop at most once, for all streams that have something new.

    Args:
        engine: the engine; nothing else may step it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failed = False
        self._changed = threading.Condition()
        self._stopping = False
        self._streams: list[Stream] = []
        self._thread = threading.Thread(target=self._run, name="sparsight-engine", daemon=True)
        self._events: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread; called on the event loop that reads the streams."""
        self._events = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End all requests, and the thread after its current step."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        self.engine.close()

    def submit(
        self, inputs: Mapping[str, Any], recipe: Recipe, params: SamplingParams, keep_positions: bool, salt: str
    ) -> Stream:
        """Give the engine a request, as :meth:`sparsight.Engine.add` does. It never waits for a step."""
        handle = self.engine.add(inputs=inputs, recipe=recipe, params=params, keep_positions=keep_positions, salt=salt)
        stream = Stream(handle)
        with self._changed:
            self._streams.append(stream)
            self._changed.notify()
        return stream

    def abort(self, stream: Stream) -> None:
        """End a request; its memory is free after the next step."""
        self.engine.abort(stream.handle)

    def take(self, stream: Stream) -> list[Piece]:
        """The pieces that have not been handed to the event loop."""
        with self._changed:
            return stream.handle.take()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self.engine.busy):
                    self._changed.wait()
                if self._stopping:
                    return
            try:
                self.engine.step()
            # A failure that belongs to a request ends that request in the engine: this one is the engine's own.
            except Exception:
                logger.exception("The engine failed.")
                self.failed = self._stopping = True
                for stream in self._streams:
                    stream.handle.fail(EngineError("The engine failed."))
            self._publish()

    def _publish(self) -> None:
        """Hand what a step made to the event loop."""
        with self._changed:
            # Whether a request is done is read before its pieces, which it may get in between.
            news = [
                (each, each.handle.done, each.handle.ended, each.handle.take())
                for each in self._streams
                if each.has_news
            ]
            finished = {id(each) for each, done, _, _ in news if done}
            self._streams = [each for each in self._streams if id(each) not in finished]
        if news and self._events is not None and not self._events.is_closed():
            self._events.call_soon_threadsafe(_deliver, news)


def _deliver(news: list[tuple[Stream, bool, Mapping[int, Completion], list[Piece]]]) -> None:
    for stream, done, ended, pieces in news:
        stream.deliver(pieces, ended, done)
