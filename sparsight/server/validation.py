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

OWN = "sparsight"
"""Type of errors whose message is one of our own sentences, which follows the name of the field."""


def body_error(errors: Sequence[Mapping[str, Any]], body: Any) -> APIError:
    """What the client of a malformed body is told: of the field that is wrong, the innermost if there are several."""
    if errors[0]["type"] == "json_invalid":
        return APIError(400, "The body is not valid JSON.")
    fields = [_field(error, body) for error in errors]
    field = max(fields, key=len)
    # A field that may be one of several types has an error for each.
    wrong = [_sentence(error) for error, other in zip(errors, fields, strict=True) if other == field]
    name = _name(field)
    return APIError(400, f"{name or 'The body'} {' or '.join(dict.fromkeys(wrong))}.", param=name or None)


def _sentence(error: Mapping[str, Any]) -> str:
    if error["type"] == OWN:
        return str(error["msg"])
    return SENTENCES.get(error["type"], "is not valid").format(**error.get("ctx", {}))


def _field(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The keys and indices of a field. Pydantic's location also has the types of unions, which the body has not."""
    location = list(error["loc"][1:])
    field, value = [], body
    for part in location:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            field.append(part)
            value = value[part]
    if error["type"] == "missing" and location:
        field.append(location[-1])
    if error["type"].startswith("union_tag"):
        field.append(str(error["ctx"]["discriminator"]).strip("'"))
    return field


def _name(field: Sequence[str | int]) -> str:
    """The field as a path such as ``messages[0].content``."""
    name = ""
    for part in field:
        name += f"[{part}]" if isinstance(part, int) else f".{shorten(part, 80)}"
    return name.removeprefix(".")
