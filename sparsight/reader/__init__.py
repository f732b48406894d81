"""The small vision-language model that ships with the package, and the pictures that it was trained on."""

from importlib.resources import files
from pathlib import Path


def model_path() -> Path:
    """Folder of the shipped checkpoint, for `AutoProcessor.from_pretrained` and its like."""
    return Path(str(files("sparsight.reader") / "checkpoint"))


def head_scores_path() -> Path:
    """The shipped model's head scores, as `sparsight calibrate` measured them."""
    return model_path() / "heads.json"
