"""Errors for unknown names, with the most similar known name."""

import difflib
from collections.abc import Iterable

from sparsight.utils.text import shorten


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """A ValueError for an unknown name, which suggests the most similar known one."""
    known, name = list(known), shorten(name)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ValueError(f"Unknown {what} {name!r}: {hint}Known are {', '.join(known)}.")
