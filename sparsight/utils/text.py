"""Text from outside, such as file names and other libraries' errors, made safe to print in messages."""

import unicodedata

ESCAPED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, lone surrogates, and line and paragraph separators."""

BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the direction of the text around them."""


def escape(text: object, keep: str = "") -> str:
    r"""``str(text)`` with control characters, except those in ``keep``, as escape sequences such as ``\x1b``."""
    return "".join(
        char.encode("unicode_escape").decode() if char not in keep and _is_control(char) else char for char in str(text)
    )


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ESCAPED or char in BIDIRECTIONAL


def printable(text: object, limit: int = 200) -> str:
    """A name for a message: control characters escaped, and the middle left out if longer than ``limit``."""
    return escape(shorten(str(text), limit))


def shorten(text: str, limit: int = 200) -> str:
    """A text with its middle left out if it is longer than ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 2) :]}"


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, on one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return printable(line.split(". ")[0].rstrip("."), 500) + "."


def quoted(value: object, limit: int = 80) -> str:
    """A short form of a value for a message: strings in quotation marks, other values as Python writes them."""
    return f"'{printable(value, limit)}'" if isinstance(value, str) else printable(repr(value), limit)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mebibytes(count: int) -> str:
    """A number of bytes in MiB."""
    return f"{count / 2**20:.2f} MiB"
