"""Errors for unknown names, with the most similar known name."""

import difflib
from collections.abc import Iterable

from sparsight.utils.text import shorten


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """A ValueError for an unknown name, which suggests the most similar known one."""
    known, name = list(known), shorten(name)
    if len(known) == 1:
        return ValueError(f"Unknown {what} {name!r}: it can only be {known[0]!r}.")
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? Known" if nearest else "known"
    return ValueError(f"Unknown {what} {name!r}: {hint} are {', '.join(known)}.")
