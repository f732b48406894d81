"""Append-only files of JSON lines, which survive a crash of the process that writes them."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


def recover(path: Path) -> Iterator[Any]:
    """Yield the values in a file, if it exists, and remove a last line that a crash left incomplete.

    Raises:
        OSError: the file cannot be read or written.
        json.JSONDecodeError: a complete line is not JSON.
    """
    if not path.exists():
        return
    with open(path, "rb+") as file:
        complete = 0
        for line in file:
            # Only the last line can be incomplete, and only the beginning of an object was written by append.
            if line.endswith(b"\n") or not line.startswith(b"{"):
                yield json.loads(line)
                complete += len(line)
            else:
                file.truncate(complete)


def append(file: TextIO, lines: Iterable[Any]) -> None:
    """Write one line per value, and return when they are on disk."""
    file.write("".join(json.dumps(line) + "\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())
