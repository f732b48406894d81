"""Other programs: where they may keep files, and why they failed."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def cache_folder() -> Path:
    """Sparsight's folder among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsight"


def failure(command: Sequence[str]) -> str | None:
    """Run a command: the last error that it printed, without a full stop, or None if it succeeded."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if not result.returncode:
        return None
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines or ["no reason given"]
    return (errors[-1].partition(": ")[2] or errors[-1]).rstrip(".")
