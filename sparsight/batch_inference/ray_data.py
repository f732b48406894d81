"""A model's answers to many rows on a Ray cluster, where Ray Data opens pictures, holds the models, and tries again."""

import contextlib
import logging
import pickle
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sparsight.batch_inference.answerer import MOST_ROWS
from sparsight.batch_inference.job import Job
from sparsight.batch_inference.output import Result
from sparsight.batch_inference.preparation import Preparation, prepared
from sparsight.batch_inference.rows import Row

BLOCKS = 4
"""Blocks of rows for each replica at least, so that none has nothing to do for long."""


@dataclass(frozen=True)
class Cluster:
    """Where the models are.

    Args:
        address: of a running Ray cluster, ``auto`` for the one of this machine, or ``local`` to start one here.
        replicas: how many models there are.
        gpus_per_replica: how many GPUs each has, or a fraction of one; None for one where the cluster has any.
    """

    address: str
    replicas: int = 1
    gpus_per_replica: float | None = None


def results_on(cluster: Cluster, job: Job, rows: Iterable[Row]) -> Iterator[list[Result]]:
    """As :func:`sparsight.batch_inference.job.results`, on a cluster whose machines see the pictures at the same paths.

    What a worker that dies was doing is done again by another.

    Raises:
        ValueError: Ray is not installed or not there, or the model cannot be loaded.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--ray needs Ray: pip install 'sparsight[ray]'.") from error
    own = not ray.is_initialized()
    # What Ray's threads have to say of its workers, at the latest in the end, is no output of ours.
    with contextlib.redirect_stdout(sys.stderr):
        if own:
            _connect(ray, cluster.address)
        try:
            yield from _results(ray, cluster, job, [_anywhere(row) for row in rows])
        except ray.exceptions.RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1].rstrip(".")
            raise ValueError(f"A worker of the Ray cluster failed: {cause}.") from error
        finally:
            if own:
                ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address, log_to_driver=False, logging_level="error")
    # What it raises depends on how far it got.
    except Exception as error:
        raise ValueError(f"There is no Ray cluster at {address!r}; local starts one.") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _results(ray: Any, cluster: Cluster, job: Job, rows: list[Row]) -> Iterator[list[Result]]:
    resources = ray.cluster_resources()
    gpus = cluster.gpus_per_replica
    if gpus is None:
        gpus = 1 if resources.get("GPU") else 0
    # What the models leave is for opening pictures.
    cpus = 0 if gpus else max(0.5, (resources["CPU"] - 1) // cluster.replicas)
    together = max(1, min(job.batch_size or MOST_ROWS, len(rows) // (BLOCKS * cluster.replicas)))
    blocks = -(-len(rows) // together)
    answered = (
        ray.data.from_items([{"row": pickle.dumps(row)} for row in rows], override_num_blocks=blocks)
        .map(partial(_prepare, job.preparation), num_cpus=0.5)
        .map_batches(
            _Replica,
            fn_constructor_args=(job,),
            batch_size=together,
            compute=ray.data.ActorPoolStrategy(size=cluster.replicas),
            num_cpus=cpus,
            num_gpus=gpus,
        )
    )
    for found in answered.iter_rows():
        yield pickle.loads(found["results"])


def _anywhere(row: Row) -> Row:
    """A row that names its files whatever folder a worker is in."""
    return replace(row, images=tuple(image if isinstance(image, bytes) else image.absolute() for image in row.images))


def _prepare(preparation: Preparation, given: dict[str, Any]) -> dict[str, Any]:
    return {"prepared": pickle.dumps(prepared(preparation, pickle.loads(given["row"])))}


class _Replica:
    """A model on a worker of the cluster."""

    def __init__(self, job: Job) -> None:
        self.answerer = job.answerer()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = (pickle.loads(each) for each in batch["prepared"])
        return {"results": [pickle.dumps(some) for some in self.answerer.answer(rows)]}
