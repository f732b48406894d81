"""The worked estimate in docs/scale.md."""

import json

import pytest

from docs.sizing import COMMAND, PAGE, PART, RESULT, sizing
from docs.tables import replace_part


def case(rows_per_second, peak):
    return {"rows_per_second": rows_per_second, "peak_bytes_with_children": peak}


def test_replicas_and_memory_follow_from_the_measured_rate():
    result = {
        "date": "2026-01-02",
        "pages": 2000,
        "new_tokens": 100,
        "machine": "a machine",
        "threads": 2,
        "torch": "2.13.0",
        "method": "vl-cache",
        "budget": 0.1,
        "loop_batch_size": 16,
        # A day has 86,400 seconds: 1,158 replicas of one row a second, 579 of two.
        "cases": {"loop": case(1.0, 2**31), "sparsight batch": case(2.0, 2**30)},
    }
    lines = [line.split(" | ") for line in sizing(result).splitlines() if line.startswith("|")]
    assert lines[2] == ["| loop", "1.00", "2.00 GiB |"]
    assert lines[-2] == ["| loop", "1,158 (2,316 GiB)", "166 (332 GiB)", "39 (78 GiB) |"]
    assert lines[-1] == ["| sparsight batch", "579 (579 GiB)", "83 (83 GiB)", "20 (20 GiB) |"]


@pytest.mark.skipif(not RESULT.exists(), reason="make bench-batch has not been run")
def test_the_page_says_what_was_measured():
    page = PAGE.read_text()
    assert replace_part(page, PART, COMMAND, sizing(json.loads(RESULT.read_text()))) == page


def test_the_page_has_a_place_for_it():
    assert "what was measured\n<!-- end -->" in replace_part(PAGE.read_text(), PART, COMMAND, "what was measured")
