import pytest

from sparsight.utils.suggest import unknown
from sparsight.utils.text import first_sentence, printable, shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\u00e9 \u7dba\u9e97.png", "caf\u00e9 \u7dba\u9e97.png"),
        ("a\x1b[31mb\nc\x07", r"a\x1b[31mb\nc\x07"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("bad\udcff", r"bad\udcff"),
        ("x" * 500, "x" * 100 + "..." + "x" * 100),
    ],
)
def test_names_are_escaped_and_cut(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_the_middle_of_a_long_text_is_left_out() -> None:
    assert shorten("0123456789", 10) == "0123456789"
    assert shorten("0123456789ab", 10) == "01234...789ab"


def test_the_first_sentence_of_an_error_is_one_line_that_can_be_printed() -> None:
    assert first_sentence(ValueError("It failed. Details follow.")) == "It failed."
    assert first_sentence(ValueError("\nNo \x1b[1mway\nat all")) == r"No \x1b[1mway."
    assert first_sentence(KeyError()) == "KeyError."
    assert len(first_sentence(ValueError("x" * 10_000))) < 600


def test_unknown_names_are_cut_and_the_nearest_is_suggested() -> None:
    assert str(unknown("method", "snap\x1b", ["snapkv", "h2o"])) == (
        r"Unknown method 'snap\x1b': did you mean 'snapkv'? Known are snapkv, h2o."
    )
    assert len(str(unknown("method", "m" * 100_000, ["snapkv", "h2o"]))) < 300
