"""Parsing and checking options; nothing here imports torch, so that a mistyped value is refused at once."""

from collections.abc import Callable, Iterable, Sequence

from sparsight.utils import checks
from sparsight.utils.method_names import ALIASES, METHODS, PARTS
from sparsight.utils.suggest import unknown


def names(text: str, known: Iterable[str]) -> list[str]:
    """The names in ``text`` without repetitions, or all of ``known`` for ``all``."""
    return list(known) if text == "all" else list(dict.fromkeys(name.strip() for name in text.split(",")))


def budget_list(text: str) -> list[float]:
    """Budgets, ascending.

    Raises:
        ValueError: one of them is not a number.
    """
    try:
        return sorted({float(number) for number in text.split(",")})
    except ValueError as error:
        raise ValueError(f"Budgets are numbers separated by commas, such as 0.01,0.05,0.1, not {text!r}.") from error


def count_list(option: str, text: str) -> list[int]:
    """Integers of at least 1, ascending; ``2k`` is 2048.

    Raises:
        ValueError: one of them is not an integer of at least 1.
    """
    words = [word.strip().lower() for word in text.split(",")]
    try:
        counts = sorted({int(word[:-1]) * 1024 if word.endswith("k") else int(word) for word in words})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ValueError(f"{option} takes integers of at least 1 separated by commas, such as 2k,8k, not {text!r}.")
    return counts


def byte_count(option: str, text: str) -> int:
    """Bytes, of a number with a unit such as ``8GiB`` or ``500MB``, or without one.

    Raises:
        ValueError: it is something else.
    """
    number = text.strip().lower().removesuffix("b")
    base = 1024 if number.endswith("i") else 1000
    number = number.removesuffix("i")
    power = "kmgt".find(number[-1:]) + 1 if number else 0
    try:
        count = int(float(number[:-1] if power else number) * base**power)
    except (ValueError, OverflowError):
        count = -1
    if count < 0:
        raise ValueError(f"{option} takes a number of bytes such as 8GiB or 500MB, not {text!r}.")
    return count


def check_method(name: str) -> str:
    """``name``, if it is a method's or an alias; otherwise ValueError."""
    if ALIASES.get(name, name) not in METHODS:
        raise unknown("method", name, METHODS)
    return name


def check_methods(text: str) -> str:
    """A list of methods, if there are such methods; otherwise ValueError."""
    for name in names(text, METHODS):
        check_method(name)
    return text


def check_part(role: str) -> Callable[[str | None], str | None]:
    """A check that a part of a method, such as ``mixkv:post-vision``, is left out or has known kinds."""

    def check(kinds: str | None) -> str | None:
        for kind in [] if kinds is None else kinds.split(":"):
            if kind not in PARTS[role]:
                raise unknown(role, kind, PARTS[role])
        return kinds

    return check


def check_budget(budget: float | None) -> float | None:
    """A budget, if it is in range; otherwise ValueError."""
    if budget is not None:
        checks.fraction("budget", budget)
    return budget


def check_budgets(text: str) -> str:
    """A list of budgets, if all are in range; otherwise ValueError."""
    for budget in budget_list(text):
        check_budget(budget)
    return text


def check_one_of(what: str, known: Sequence[str]) -> Callable[[str | None], str | None]:
    """A check that an option, called ``what`` in messages, is left out or one of ``known``."""

    def check(name: str | None) -> str | None:
        if name is not None and name not in known:
            raise unknown(what, name, known)
        return name

    return check
