"""The performance page has the measured values, and marks what was not measured."""

import json
from pathlib import Path

import pytest

from docs import performance
from sparsight import recipe
from sparsight.bench.benchmark import Case
from sparsight.bench.measure import Sample
from sparsight.bench.summary import summarize

EMPTY = "before\n<!-- bench: written by make performance -->\n<!-- end -->\nafter\n"


def sample(first: float, token: float, held: int) -> Sample:
    return Sample(first, 0.5, 0.25, token, first + 9 * token, held, held, 2**20)


def size(context: int, batch: int) -> list[Case]:
    full, kept, kvpress = (
        Case(name, budget, context, batch)
        for name, budget in (("transformers", 1.0), ("kept-length", 0.1), ("kvpress", 0.1))
    )
    ours = [Case(name, 0.1, context, batch, recipe(name)) for name in ("vl-cache", "snapkv")]
    large = Case("elastic", 0.1, context, batch, recipe("elastic"), reason="does not fit: memory ran out")
    full.samples = [sample(100, 8, 1000), sample(110, 8, 1000)]
    kept.samples = [sample(10, 1, 100)] * 2
    kvpress.samples = [sample(110, 4, 100)] * 2
    ours[0].samples = [sample(101, 2, 125), sample(111.1, 2, 125)]
    ours[1].samples = [sample(99, 1, 125)] * 2
    for cell in (full, kept, kvpress, *ours):
        cell.bandwidths = [1000.0] * 2
    return [full, kept, kvpress, *ours, large]


def run(device: str, *sizes: tuple[int, int]) -> str:
    about = {"machine": "a machine", "device": device, "threads": 2, "model": "small, random weights", "rounds": 2}
    versions = {"torch": "2.0", "transformers": "5.0", "kvpress": {"kvpress": "0.5", "transformers": "4.0"}}
    described = {"dtype": "float32", "new_tokens": 10, "date": "2026-01-02", "command": "sparsight bench"}
    cells = summarize([size(*each) for each in sizes], new_tokens=10, weights=400, free=9000)
    return json.dumps({**about, **versions, **described, "cells": cells})


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "bench.json").write_text(text)


def row(page: str, start: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_what_the_results_say() -> None:
    text = performance.PAGE.read_text()
    assert performance.with_results(text) == text, (
        "docs/performance.md is behind benchmarks/results: run make performance."
    )


def test_without_results_every_target_is_not_yet_measured(tmp_path: Path) -> None:
    page = performance.with_results(EMPTY, tmp_path)
    assert page.startswith("before\n") and page.endswith("after\n")
    lines = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(performance.TARGETS) + 1
    assert all("not yet measured" in line for line in lines)
    assert performance.with_results(page, tmp_path) == page


def test_targets_are_of_the_right_machine_and_cells(tmp_path: Path) -> None:
    write(tmp_path, "cpu", run("cpu", (1024, 1), (8192, 1)))
    write(tmp_path, "gpu", run("cuda", (8192, 16)))
    page = performance.with_results(EMPTY, tmp_path)
    overhead = "prefill overhead, VL-Cache, from 2,900 tokens on"
    assert row(page, overhead)[1:] == ["at most 2 %", "1.0 %", "at most 2 %", "1.0 %"]
    assert row(page, "prefill overhead, Elastic Cache, from 2,900 tokens on")[2] == "not yet measured"
    kept = row(page, "time per token vs transformers with a prompt of the kept length")
    assert (kept[2], kept[4]) == ("1.000 to 2.000 x", "1.000 to 2.000 x")
    # 525 of 1000 bytes a second, in one second and in two.
    assert row(page, "time per token vs the bandwidth limit")[2:] == ["1.905 to 3.810 x", "", ""]
    assert row(page, "time per token vs the bandwidth limit, batch 16 and more")[1:] == [
        "",
        "",
        "at most 1.3 x",
        "1.905 to 3.810 x",
    ]
    assert row(page, "SnapKV, time per token vs kvpress")[2] == "0.250 x"
    assert row(page, "SnapKV, time to the first token vs kvpress")[2] == "0.900 x"
    best = row(page, "decoding, best speed-up over the full cache")
    assert (best[2], best[4]) == ("", "8.00 x (snapkv, 16 of 8k)")
    assert row(page, "sequences of 8k tokens that fit vs the full cache")[4] == "8.0 x"


def test_a_run_has_its_tables_and_with_several_contexts_its_pictures(tmp_path: Path) -> None:
    write(tmp_path, "one", run("cpu", (8192, 1)))
    page = performance.with_results(EMPTY, tmp_path)
    assert "### small, random weights, float32, a machine, 2 threads\n" in page
    assert "kvpress 0.5 on transformers 4.0; 10 tokens, rounds: 2;" in page
    assert (
        "| 8k | 1 | vl-cache 10 % | 106,050 (101,000-111,100) | 1.010 | 2,000 | 0.250 | 2.000 | 3.810 | 0.500 | "
        "124,050 (119,000-129,100) | 0.701 |"
    ) in page
    assert "| 8k | 1 | elastic 10 % | does not fit: memory ran out |" in page
    assert "| 8k | 1 | vl-cache 10 % | 500 | 250 | 0.0 | 0.125 | 1.0 |" in page
    assert ".png" not in page
    write(tmp_path, "two", run("cpu", (1024, 1), (8192, 1)))
    page = performance.with_results(EMPTY, tmp_path)
    assert "![Costs by context](../benchmarks/results/two/growth.png)" in page
    assert "results/one/" not in page


@pytest.mark.parametrize("measured", [False, True])
def test_kernels_are_shown_where_a_gpu_measured_them(tmp_path: Path, measured: bool) -> None:
    case = {"shape": "llava-1.5-7b", "context": 2048, "batch": 4, "reason": None, "launches_per_layer": 3.0}
    case |= {"bytes": 8e9, "kernel_seconds": 2e-3, "of_bandwidth": 0.85}
    launches = [{"method": "full", "layers": 8, "prefill": 100, "decode": 20}]
    about = {"machine": "a GPU", "date": "2026-01-02", "torch": "2.0", "command": "python"}
    found = {**about, "decode": [case, {**case, "reason": "does not fit"}], "launches": launches}
    (tmp_path / performance.KERNELS).write_text(json.dumps(found if measured else {"reason": "there is no GPU"}))
    page = performance.with_results(EMPTY, tmp_path)
    kernel = row(page, "ragged decode kernel, best share of the copy bandwidth")[-1]
    assert kernel == ("85%" if measured else "not yet measured")
    assert ("| llava-1.5-7b | 2k | 4 | 4,000 | 85% | 3 |" in page) is measured
    assert ("| full | 100 | 20 |" in page) is measured


def test_prefills_of_all_methods_are_a_table_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, performance.PREFILL, run("cpu", (2900, 1)))
    page = performance.with_results(EMPTY, tmp_path)
    assert row(page, "vl-cache 10 %")[1:3] == ["106,050 (101,000-111,100)", "1.010"]
    assert row(page, "elastic 10 %")[1].startswith("does not fit")
    # A few tokens say little about decoding.
    assert "per token, ms" not in page and performance.NOT_MEASURED in page
