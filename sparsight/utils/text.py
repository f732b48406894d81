"""Text that comes from outside, made fit for messages."""


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, on one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". ")[0].rstrip(".") + "."
