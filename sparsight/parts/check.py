"""Checks of the numbers that parts and recipes are made of."""


def fraction(name: str, value: float, *, zero: bool = False) -> None:
    """Raise ValueError unless ``value`` lies in (0, 1], or in [0, 1] with ``zero``."""
    inside = isinstance(value, int | float) and (0 <= value <= 1 if zero else 0 < value <= 1)
    if not inside:
        raise ValueError(f"{name} must be a number in {'[' if zero else '('}0, 1], got {value!r}.")


def count(name: str, value: int, *, least: int = 0) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def odd(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an odd whole number of at least 1."""
    if not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name} must be an odd whole number of at least 1, got {value!r}.")
