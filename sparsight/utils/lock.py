"""A lock against two runs that write the same results."""

import contextlib
from pathlib import Path
from typing import IO, Any

from sparsight.utils.text import printable


def lock(file: IO[Any], path: Path) -> None:
    """Lock an open file until it is closed; ``path`` is what the lock protects, for the message.

    The lock belongs to the process, which must not open the file a second time: closing either one releases it.

    Raises:
        ValueError: another process has the lock.
    """
    # Windows has no such locks.
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"Another run is writing {printable(path)}.") from error
