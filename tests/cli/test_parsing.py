"""Sizes as options take them."""

import pytest

from sparsight.cli.parsing import byte_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("17", 17), ("8GiB", 2**33), ("500MB", 5 * 10**8), ("1.5 kib", 1536), ("2k", 2000), ("1T", 10**12)],
)
def test_a_number_of_bytes_may_have_a_unit(text: str, count: int) -> None:
    assert byte_count("--host-memory", text) == count


@pytest.mark.parametrize("text", ["", "many", "-1", "8QiB", "GiB", "nan", "inf", "i", "8ii"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--host-memory takes a number of bytes such as 8GiB or 500MB, not"):
        byte_count("--host-memory", text)
