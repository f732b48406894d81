"""Bandwidth of matrix-vector products on a CPU, as in decoding, against that of a copy.

`packed` multiplies weights that oneDNN has reordered, a second copy in memory.

    python -m benchmarks.weight_products --output benchmarks/results/products-cpu.json
"""

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from sparsight.bench import machine

SIZES = ((1376, 512, 64), (11008, 4096, 3))
"""Rows, columns and number of matrices: the MLPs of `small` and `llava-1.5-7b`."""
DTYPES = (torch.float32, torch.bfloat16)
THREADS = (1, 2)
ROUNDS = 20


def main(output: Annotated[Path, typer.Option(help="JSON file for the result.")]) -> None:
    """Measure every size, dtype and number of threads."""
    device = torch.device("cpu")
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        copy = max(machine.copy_bandwidth(device) for _ in range(ROUNDS))
        for dtype in DTYPES:
            for size in SIZES:
                about = {"threads": threads, "dtype": str(dtype).removeprefix("torch."), "size": size[:2]}
                found.append({**about, **bandwidths(*size, dtype), "copy": copy})
    result = {
        "command": "python -m benchmarks.weight_products " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(device),
        "torch": torch.__version__,
        "products": found,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    show(found)


@torch.inference_mode()
def bandwidths(rows: int, columns: int, count: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of weights per second, in their own layout and packed."""
    weights = [torch.randn(rows, columns).to(dtype) for _ in range(count)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(each, 1) for each in weights]
    row = torch.randn(1, columns).to(dtype)
    size = sum(each.nbytes for each in weights)

    def of_packed(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(row, weight, None, "none", [], "")

    return {
        "linear": size / fastest(lambda: [functional.linear(row, each) for each in weights]),
        "packed": size / fastest(lambda: [of_packed(each) for each in packed]),
    }


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of some work, the best of :data:`ROUNDS`."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def show(found: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    table = Table("threads", "dtype", "matrix", "linear", "packed", "copy", title="vector times matrix, GB/s")
    for case in found:
        speeds = (f"{case[name] / 1e9:.1f}" for name in ("linear", "packed", "copy"))
        table.add_row(str(case["threads"]), case["dtype"], "{} x {}".format(*case["size"]), *speeds)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
