"""Files of JSON lines that are only ever appended to, so that what was written outlives the run that wrote it."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


def recover(path: Path) -> Iterator[Any]:
    """What the lines of a file hold, if there is one; a last line that a crash cut short is cut off first.

    Raises:
        OSError: the file cannot be read or written.
        json.JSONDecodeError: a whole line is no JSON.
    """
    if not path.exists():
        return
    with open(path, "rb+") as file:
        whole = 0
        for line in file:
            # No other line can be broken, and nothing but a beginning of an object is ours to cut off.
            if line.endswith(b"\n") or not line.startswith(b"{"):
                yield json.loads(line)
                whole += len(line)
            else:
                file.truncate(whole)


def append(file: TextIO, lines: Iterable[Any]) -> None:
    """Write a line for each, and return when they are on disk."""
    file.write("".join(json.dumps(line) + "\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())
