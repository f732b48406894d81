"""Output paths: missing folders are created, and existing results are replaced only with ``--force``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_file(path: Path, *, replace: bool) -> None:
    """Check that a file can be written, without writing anything.

    Raises:
        ValueError: ``path`` is a folder or a device, cannot be written, or exists with content and without ``replace``.
    """
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file.")
        if path.exists():
            if not path.is_file():
                raise ValueError(f"{path} is a device, not a file: name a file.")
            if path.stat().st_size and not replace:
                raise ValueError(f"{path} exists: give --force to replace it, or another --output.")
        _check_folder(next(folder for folder in path.absolute().parents if folder.exists()))
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror}.") from error


def check_folder(folder: Path, name: str, *, replace: bool) -> None:
    """:func:`check_file` of the file ``name`` in a folder that may not exist yet.

    Raises:
        ValueError: the file cannot be written, or exists with content and without ``replace``.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder: name a folder.")
    check_file(folder / name, replace=replace)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Create the folder of ``path`` before, and raise ValueError for what goes wrong while ``path`` is written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror}.") from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"There is no permission to write to {folder}.")
