"""Names and texts from outside, made safe for messages and records."""

from typing import Any

MAX_SENTENCE, MAX_NAME = 400, 80
"""Characters that messages quote of a sentence and of a name."""


def clean(text: str, limit: int = MAX_SENTENCE) -> str:
    """A text on one line: characters that do not print are escaped, and the middle of a long text is left out."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[len(text) - limit // 2 :]}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def quoted(value: Any) -> str:
    """A short form of a value from the input: strings in quotation marks, other values as Python writes them."""
    return f"'{clean(value, MAX_NAME)}'" if isinstance(value, str) else clean(repr(value), MAX_NAME)
