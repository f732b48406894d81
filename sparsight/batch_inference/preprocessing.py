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
from PIL import Image, ImageOps

from sparsight.batch_inference.rows import Row
from sparsight.models.images import ImageError, open_image, read_image, to_rgb
from sparsight.models.inputs import check_length, prepare
from sparsight.models.loading import Checkpoint
from sparsight.utils.text import printable, quoted

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
        self.kind, self.sentence = kind, printable(sentence, 400)


OUT_OF_MEMORY = RowError("out of memory", "There is not enough memory for this prompt, even alone.")


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
        except ImageError as error:
            if isinstance(error.__cause__, MemoryError):
                raise OUT_OF_MEMORY from error
            raise RowError(error.kind, str(error)) from error
        except MemoryError as error:
            raise OUT_OF_MEMORY from error
        except ValueError as error:
            raise RowError("refused prompt", str(error)) from error
        # An unexpected exception about one image among thousands must not end the run.
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
            raise RowError("processor failed", f"The processor failed, {type(error).__name__}: {reason}.") from error
        try:
            check_length(self.checkpoint.config, inputs, self.max_new_tokens)
        except ValueError as error:
            raise RowError("prompt too long", str(error)) from error
        return inputs

    def _open(self, row: Row, image: Any) -> Any:
        name = f"The image of row {quoted(row.id)}"
        if isinstance(image, bytes):
            return read_image(BytesIO(image), name, self.max_pixels)
        if not isinstance(image, Image.Image):
            return open_image(image, self.max_pixels)
        if image.width * image.height > self.max_pixels:
            limit = f"more than the limit of {self.max_pixels:,} pixels"
            raise ImageError("too many pixels", f"{name} is {image.width} x {image.height}, {limit}.")
        return to_rgb(ImageOps.exif_transpose(image))


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
                "A process that opens images died, perhaps for lack of memory: the same command continues the run."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _collect(row: Row, future: "Future[bytes]") -> Preprocessed:
    try:
        return row, pickle.loads(future.result())
    except BrokenProcessPool:
        raise
    # An open image is decoded when it is sent to a worker.
    except Exception as error:
        return row, RowError("damaged picture", f"An image of row {quoted(row.id)} cannot be decoded: {error}.")


_preprocessor: Preprocessor


def _init_worker(preprocessor: Preprocessor) -> None:
    global _preprocessor
    _preprocessor = preprocessor
    # Ctrl-C and SIGTERM, which a terminal or a supervisor may send to the process group, are for the main process. The
    # workers end with it, and the pool ends them with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.name == "posix":
        os.setpgrp()
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
