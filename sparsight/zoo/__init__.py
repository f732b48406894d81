"""The small vision-language model that ships with the package, and the pictures that it was trained on."""

from importlib.resources import files
from pathlib import Path


def model_path() -> Path:
    """Folder of the shipped checkpoint, for `AutoProcessor.from_pretrained` and its like."""
    return Path(str(files("sparsight.zoo") / "reader"))
