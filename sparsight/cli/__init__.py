"""The ``sparsight`` command and its subcommands."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Failures of a write, whose OSError names no file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on ``arguments``, by default ``sys.argv[1:]``, and exit.

    The exit code is 2 after a user error, 1 if the output cannot be written, and 130 after Ctrl-C or SIGTERM.
    """
    # During imports there is nothing to save: a signal ends the process at once, without a traceback.
    set_stop_signals(signal.SIG_DFL)
    from sparsight.cli.app import app
    from sparsight.utils.text import escape

    try:
        try:
            app(arguments)
        finally:
            # At exit, an error would be a traceback, and so would a signal.
            set_stop_signals(signal.SIG_DFL)
            print(end="", flush=True)
    except ValueError as error:
        print(f"Error: {escape(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        # What is still buffered would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"Error: Cannot write the output: {error.strerror}.", file=sys.stderr)
        sys.exit(1)


def set_stop_signals(handler: Callable[[int, Any], Any] | signal.Handlers) -> None:
    """Set what Ctrl-C and SIGTERM do, unless the process was started to ignore them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
