"""Range checks for numeric arguments."""

import math
from collections.abc import Sequence


def fraction(name: str, value: float, *, zero: bool = False) -> None:
    """Raise ValueError unless ``value`` lies in (0, 1], or in [0, 1] with ``zero``."""
    inside = isinstance(value, int | float) and (0 <= value <= 1 if zero else 0 < value <= 1)
    if not inside:
        raise ValueError(f"{name} must be a number in {'[' if zero else '('}0, 1], got {value!r}.")


def count(name: str, value: int, *, least: int = 0) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless ``value`` is a number of at least ``least``."""
    if not isinstance(value, int | float) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {least}, got {value!r}.")


def between(name: str, value: float, least: float, most: float) -> None:
    """Raise ValueError unless ``value`` is a number from ``least`` to ``most``."""
    if not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least} to {most}, got {value!r}.")


def window(name: str, value: int | tuple[int, int]) -> None:
    """Raise ValueError unless ``value`` is an odd whole number of at least 1, or two of them."""
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    if not all(isinstance(side, int) and side >= 1 and side % 2 for side in sides):
        raise ValueError(f"{name} must be an odd whole number of at least 1, or a pair of them, got {value!r}.")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}.")
