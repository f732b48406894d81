"""The parts of the kernels' benchmark that run without a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernels
from sparsight.bench import machine
from sparsight.engine import model_runner
from tests.bench.conftest import TINY
from tests.support import recorder


def test_rows_differ_in_length_and_hold_the_budget_on_average() -> None:
    held = kernels.lengths(200, 64)
    assert (min(held), max(held), sum(held)) == (100, 300, 64 * 200)
    assert len(set(held)) == 63
    assert kernels.lengths(200, 1) == [200]


def test_storage_is_full_of_entries_that_attention_reads() -> None:
    like = torch.empty(2, 3, 0, 8)
    entries = kernels.random_store([4, 5, 6, 4, 5, 6], like)
    output = entries.attend(torch.zeros(2, 6, 1, 8), None, None)
    # No key is preferred: the mean of a row's values, for both query heads that share it.
    first = entries.values[entries.starts[1] : entries.starts[1] + 5].mean(0)
    assert torch.allclose(output[0, 2, 0], first, atol=1e-6)
    assert torch.equal(output[0, 2], output[0, 3])


def test_a_profilers_events_are_launches_and_work() -> None:
    def event(name: str, device: str, microseconds: int = 0) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            device_type=SimpleNamespace(name=device),
            time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
        )

    events = [
        event("aten::mul", "CPU", 50),
        event("cudaLaunchKernel", "CPU", 5),
        event("cuLaunchKernelEx", "CPU", 5),
        event("cudaStreamSynchronize", "CPU", 90),
        event("_attend_split", "CUDA", 30),
        event("vectorized_elementwise_kernel", "CUDA", 10),
    ]
    assert kernels.totals(events) == (40e-6, 2)


def test_all_that_is_measured_can_be_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Without a GPU to watch, work takes a millisecond and seven launches.
    watched = []
    monkeypatch.setattr(kernels, "profiled", lambda work: watched.append(work()) or (1e-3, 7))
    monkeypatch.setattr(model_runner, "capture", recorder.record)
    monkeypatch.setitem(kernels.SHAPES, "small", TINY)
    monkeypatch.setattr(machine, "COPIED_BYTES", {"cpu": 2**16})
    for name, value in {"MODELS": ("small",), "CONTEXTS": (80,), "BATCHES": (1, 2), "PROMPT": 150}.items():
        monkeypatch.setattr(kernels, name, value)
    found = kernels.measured(torch.device("cpu"))
    one, two = found["decode"]
    # Three layers, two KV heads, eight entries of a key and a value of eight numbers in bfloat16.
    assert (one["bytes"], two["bytes"]) == (3 * 2 * 8 * 2 * 8 * 2, 2 * 3 * 2 * 8 * 2 * 8 * 2)
    assert one["of_bandwidth"] == pytest.approx(one["bytes"] / 1e-3 / one["copy_bandwidth"])
    assert one["launches_per_layer"] == 7 / 3
    assert [row["method"] for row in found["launches"]] == ["transformers", *kernels.METHODS]
    # Twice a prefill and a token, and for methods three more tokens, the last of which is replayed.
    assert len(watched) == 2 * kernels.ROUNDS + 4 + 7 * len(kernels.METHODS)
    assert ["replayed" in row for row in found["launches"]] == [False] + [True] * len(kernels.METHODS)
    kernels.show(found)
    shown = capsys.readouterr().out
    assert "Ragged decode kernel" in shown and "snapkv" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(tmp_path / "new" / "kernels.json")
    assert capsys.readouterr().out == "The kernels were not measured: there is no NVIDIA GPU.\n"
    assert json.loads((tmp_path / "new" / "kernels.json").read_text())["reason"].startswith("not measured")
