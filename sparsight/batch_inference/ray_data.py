"""A batch inference job on a Ray cluster: Ray Data opens images, runs replicas, and retries what a dead worker did."""

import contextlib
import logging
import pickle
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsight.batch_inference.generator import MAX_BATCH_SIZE
from sparsight.batch_inference.job import Job
from sparsight.batch_inference.preprocessing import Preprocessor, preprocess
from sparsight.batch_inference.result import Result
from sparsight.batch_inference.rows import Row

BLOCKS_PER_REPLICA = 4
"""Fewest blocks of rows for each replica, so that none is idle for long."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and the replicas on it.

    Args:
        address: address of a running Ray cluster, ``auto`` for the one of this machine, or ``local`` to start one here.
        replicas: number of copies of the model.
        gpus_per_replica: GPUs of each replica, may be a fraction; None for one if the cluster has any.
    """

    address: str
    replicas: int = 1
    gpus_per_replica: float | None = None


def run_job_on_ray(cluster: Cluster, job: Job, rows: Iterable[Row]) -> Generator[list[Result], None, None]:
    """:func:`sparsight.batch_inference.job.run_job` on a cluster whose machines have the images at the same paths.

    If a worker dies, another one repeats its work.

    Raises:
        ValueError: Ray is not installed, there is no cluster at the address, or the model cannot be loaded.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--ray needs Ray: pip install 'sparsight[ray]'.") from error
    starts_ray = not ray.is_initialized()
    # Ray's threads print messages about workers, which must not mix with our output.
    with contextlib.redirect_stdout(sys.stderr):
        if starts_ray:
            _connect(ray, cluster.address)
        try:
            yield from _results(ray, cluster, job, [_with_absolute_paths(row) for row in rows])
        except ray.exceptions.RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1].rstrip(".")
            raise ValueError(f"A worker of the Ray cluster failed: {cause}.") from error
        finally:
            if starts_ray:
                ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address, log_to_driver=False, logging_level="error")
    # The exception's type depends on the step that failed.
    except Exception as error:
        raise ValueError(f"There is no Ray cluster at {address!r}; local starts one.") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _results(ray: Any, cluster: Cluster, job: Job, rows: list[Row]) -> Iterator[list[Result]]:
    resources = ray.cluster_resources()
    gpus = cluster.gpus_per_replica
    if gpus is None:
        gpus = 1 if resources.get("GPU") else 0
    # The other CPUs are for opening images.
    cpus = 0 if gpus else max(0.5, (resources["CPU"] - 1) // cluster.replicas)
    block_size = max(1, min(job.batch_size or MAX_BATCH_SIZE, len(rows) // (BLOCKS_PER_REPLICA * cluster.replicas)))
    blocks = -(-len(rows) // block_size)
    dataset = (
        ray.data.from_items([{"row": pickle.dumps(row)} for row in rows], override_num_blocks=blocks)
        .map(partial(_preprocess, job.preprocessor), num_cpus=0.5)
        .map_batches(
            _Replica,
            fn_constructor_args=(job,),
            batch_size=block_size,
            compute=ray.data.ActorPoolStrategy(size=cluster.replicas),
            num_cpus=cpus,
            num_gpus=gpus,
        )
    )
    for record in dataset.iter_rows():
        yield pickle.loads(record["results"])


def _with_absolute_paths(row: Row) -> Row:
    """A row whose paths do not depend on a worker's current folder."""
    return replace(row, images=tuple(image.absolute() if isinstance(image, Path) else image for image in row.images))


def _preprocess(preprocessor: Preprocessor, record: dict[str, Any]) -> dict[str, Any]:
    return {"preprocessed": pickle.dumps(preprocess(preprocessor, pickle.loads(record["row"])))}


class _Replica:
    """A copy of the model in an actor of the cluster."""

    def __init__(self, job: Job) -> None:
        self.generator = job.generator()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = (pickle.loads(each) for each in batch["preprocessed"])
        return {"results": [pickle.dumps(results) for results in self.generator.generate(rows)]}
