"""Opening and preprocessing images ahead of the model, in worker processes."""

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

MAX_WORKERS = 8
PREFETCH_FACTOR = 4
"""Rows that each worker may be ahead of the model."""


class RowError(Exception):
    """A row that cannot be answered.

    Args:
        kind: short reason, the same for all rows that fail this way.
        sentence: what is wrong with this row.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(kind, sentence)
        self.kind, self.sentence = kind, sentence


@dataclass(frozen=True)
class Preprocessor:
    """Makes a model's inputs from rows.

    Args:
        checkpoint: the model's config and processor.
        max_new_tokens: longest answer, for which the context must have capacity.
        max_pixels: largest image.
    """

    checkpoint: Checkpoint
    max_new_tokens: int
    max_pixels: int

    def inputs(self, row: Row) -> Any:
        """The processor's output for a row: ``input_ids`` ``[1, T]``, pixel values, and so on.

        Raises:
            RowError: the row is malformed, an image or the prompt is refused, or the prompt is too long for the model.
        """
        if row.malformed:
            raise RowError("malformed row", row.malformed)
        try:
            images = [self._open(row, image) for image in row.images]
            inputs = prepare(self.checkpoint, images, row.prompt)
        except PictureError as error:
            raise RowError(error.kind, str(error)) from error
        except ValueError as error:
            raise RowError("refused prompt", str(error)) from error
        # An unexpected exception about one image among thousands must not end the run.
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
            raise RowError("processor failed", f"The processor failed, {type(error).__name__}: {reason}.") from error
        length = inputs["input_ids"].shape[1]
        limit = getattr(self.checkpoint.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and length + self.max_new_tokens > limit:
            sentence = f"The prompt has {length:,} tokens and the answer may have {self.max_new_tokens:,}, "
            raise RowError("prompt too long", sentence + f"but the model's context is {limit:,} tokens.")
        return inputs

    def _open(self, row: Row, image: Any) -> Any:
        if isinstance(image, bytes):
            return read_image(BytesIO(image), f"The picture of row {row.id!r}", self.max_pixels)
        return open_image(image, self.max_pixels)


Preprocessed = tuple[Row, Any]
"""A row, and the model's inputs for it or the :class:`RowError` that says why there are none."""


def preprocess(preprocessor: Preprocessor, row: Row) -> Preprocessed:
    """A row with its inputs or its error."""
    try:
        return row, preprocessor.inputs(row)
    except RowError as error:
        return row, error


def preprocess_ahead(preprocessor: Preprocessor, rows: Iterable[Row]) -> Generator[Preprocessed, None, None]:
    """Rows with their inputs, in order, made by worker processes while the model works on earlier rows.

    Raises:
        ValueError: a worker died.
    """
    workers = max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) - 1 if sys.platform == "linux" else 1))
    # A forked worker shares the loaded processor; it is forked before the weights are loaded.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pending: deque[tuple[Row, Future[bytes]]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_init_worker, initargs=(preprocessor,)) as pool:
        try:
            for row in rows:
                pending.append((row, pool.submit(_preprocess_pickled, row)))
                if len(pending) == workers * PREFETCH_FACTOR:
                    yield _collect(*pending.popleft())
            while pending:
                yield _collect(*pending.popleft())
        except BrokenProcessPool as error:
            raise ValueError(
                "A process that opens pictures died, perhaps for lack of memory: the same command continues the run."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _collect(row: Row, future: "Future[bytes]") -> Preprocessed:
    return row, pickle.loads(future.result())


_preprocessor: Preprocessor


def _init_worker(preprocessor: Preprocessor) -> None:
    global _preprocessor
    _preprocessor = preprocessor
    # Ctrl-C stops the main process, and the workers end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # torch's threads do not survive a fork.
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when its parent has been killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _preprocess_pickled(row: Row) -> bytes:
    # Pickled here: torch would pass each tensor as an open file in shared memory, and open files are limited.
    return pickle.dumps(preprocess(_preprocessor, row)[1])
