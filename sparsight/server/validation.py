"""Errors of request bodies in our own words, with the name of the field as OpenAI writes it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsight.server.errors import APIError
from sparsight.utils.text import shorten

SENTENCES = {
    "extra_forbidden": "is not supported",
    "missing": "is required",
    "string_type": "must be a string",
    "string_unicode": "must be valid Unicode",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be a JSON object, sent as application/json",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must be one of {expected_tags}",
    "union_tag_not_found": "is required",
}
"""By the type of pydantic's error; its context fills the gaps."""

_MISSING = object()

Path = tuple[str | int, ...]

OWN = "sparsight"
"""Type of errors whose message is one of our own sentences, which follows the name of the field."""


def body_error(errors: Sequence[Mapping[str, Any]], body: Any) -> APIError:
    """What the client of a malformed body is told: of the field that is wrong, the innermost if there are several."""
    if errors[0]["type"] == "json_invalid":
        return APIError(400, "The body is not valid JSON.")
    fields = [_field(error, body) for error in errors]
    field = max(fields, key=len)
    found = [error for error, other in zip(errors, fields, strict=True) if other == field]
    # A field that may be of several types has an error for each: those of the type that it has say more.
    found = [error for error in found if not error["type"].endswith("_type")] or found
    name = _name(field)
    sentences = " or ".join(dict.fromkeys(map(_sentence, found)))
    return APIError(400, f"{name or 'The body'} {sentences}.", param=name or None)


def _sentence(error: Mapping[str, Any]) -> str:
    if error["type"] == OWN:
        return str(error["msg"])
    context = error.get("ctx", {})
    # Limits of numbers are floats without need.
    context = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    return SENTENCES.get(error["type"], "is not valid").format(**context)


def _field(error: Mapping[str, Any], body: Any) -> Path:
    """The keys and indices of a field."""
    location = error["loc"][1:]
    if error["type"] == "missing":
        return (*_path(location[:-1], body)[1], *location[-1:])
    field = _path(location, body)[1]
    if error["type"].startswith("union_tag"):
        return (*field, error["ctx"]["discriminator"].strip("'"))
    return field


def _path(location: Path, value: Any) -> tuple[bool, Path]:
    """The part of pydantic's location that is in a body; it also has the types of unions.

    Returns:
        Whether its last part is, and the keys and indices.
    """
    if not location:
        return False, ()
    first, rest = location[0], location[1:]
    without = _path(rest, value)
    if isinstance(value, dict):
        value = value.get(first, _MISSING)
    elif isinstance(value, list) and isinstance(first, int) and first < len(value):
        value = value[first]
    else:
        value = _MISSING
    if value is _MISSING:
        return without
    ends, path = _path(rest, value)
    return max((ends or not rest, (first, *path)), without, key=lambda each: (each[0], len(each[1])))


def _name(field: Path) -> str:
    """The field as a path such as ``messages[0].content``."""
    name = ""
    for part in field:
        name += f"[{part}]" if isinstance(part, int) else f".{shorten(part, 80)}"
    return name.removeprefix(".")
