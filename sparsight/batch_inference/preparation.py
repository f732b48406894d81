"""Opening and preprocessing pictures ahead of the model, in processes of their own."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch

from sparsight.batch_inference.rows import Row
from sparsight.models.images import PictureError, open_image, read_image
from sparsight.models.loading import Checkpoint, prepare

MOST_WORKERS = 8
ROWS_AHEAD = 4
"""Rows that each process may be ahead of the model."""


class RowError(Exception):
    """A row that cannot be answered.

    Args:
        kind: why, in a few words that are the same for all such rows.
        sentence: why this one.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(kind, sentence)
        self.kind, self.sentence = kind, sentence


@dataclass(frozen=True)
class Preparation:
    """What every row is prepared for.

    Args:
        checkpoint: the model.
        max_new_tokens: how long an answer may be.
        max_pixels: how large a picture may be.
    """

    checkpoint: Checkpoint
    max_new_tokens: int
    max_pixels: int

    def inputs(self, row: Row) -> Any:
        """The model's inputs for a row, ``input_ids`` ``[1, T]`` and what belongs to them.

        Raises:
            RowError: the row, a picture or the prompt is bad, or the prompt too long for the model.
        """
        if row.malformed:
            raise RowError("malformed row", row.malformed)
        try:
            pictures = [self._picture(row, image) for image in row.images]
            inputs = prepare(self.checkpoint, pictures, row.prompt)
        except PictureError as error:
            raise RowError(error.kind, str(error)) from error
        except ValueError as error:
            raise RowError("refused prompt", str(error)) from error
        # What a library does not expect of one picture among thousands must not end the run.
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
            raise RowError("processor failed", f"The processor failed, {type(error).__name__}: {reason}.") from error
        length = inputs["input_ids"].shape[1]
        most = getattr(self.checkpoint.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if most is not None and length + self.max_new_tokens > most:
            sentence = f"The prompt has {length:,} tokens and the answer may have {self.max_new_tokens:,}, "
            raise RowError("prompt too long", sentence + f"but the model takes {most:,} in all.")
        return inputs

    def _picture(self, row: Row, image: Any) -> Any:
        if isinstance(image, bytes):
            return read_image(BytesIO(image), f"The picture of row {row.id!r}", self.max_pixels)
        return open_image(image, self.max_pixels)


Prepared = tuple[Row, Any]
"""A row, and the model's inputs for it or the :class:`RowError` that says why there are none."""


def prepared(preparation: Preparation, row: Row) -> Prepared:
    """A row with its inputs, or its error."""
    try:
        return row, preparation.inputs(row)
    except RowError as error:
        return row, error


def prepared_ahead(preparation: Preparation, rows: Iterable[Row]) -> Generator[Prepared, None, None]:
    """Rows with their inputs, in order, made by other processes while the model works on earlier ones.

    Raises:
        ValueError: one of the processes died.
    """
    workers = max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1 if sys.platform == "linux" else 1))
    # A forked process has the processor already; it is forked before the model is loaded.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    ahead: deque[tuple[Row, Future[bytes]]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(preparation,)) as pool:
        try:
            for row in rows:
                ahead.append((row, pool.submit(_work, row)))
                if len(ahead) == workers * ROWS_AHEAD:
                    yield _done(*ahead.popleft())
            while ahead:
                yield _done(*ahead.popleft())
        except BrokenProcessPool as error:
            raise ValueError(
                "A process that opens pictures died, perhaps of too little memory: the same command goes on from there."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _done(row: Row, future: "Future[bytes]") -> Prepared:
    return row, pickle.loads(future.result())


_preparation: Preparation


def _begin(preparation: Preparation) -> None:
    """Set a worker process up."""
    global _preparation
    _preparation = preparation
    # Who presses Ctrl-C stops the model's process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Threads of torch do not survive a fork.
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when its parent has been killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(row: Row) -> bytes:
    # Bytes, because tensors would be handed over as open files in shared memory, of which there are few.
    return pickle.dumps(prepared(_preparation, row)[1])
