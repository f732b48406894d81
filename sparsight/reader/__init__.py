"""The small vision-language model that ships with the package, and generators of the images it was trained on."""

from importlib.resources import files
from pathlib import Path


def model_path() -> Path:
    """Folder of the shipped checkpoint, as `from_pretrained` takes it."""
    return Path(str(files("sparsight.reader") / "checkpoint"))


def head_scores_path() -> Path:
    """File with the shipped model's head scores, as written by `sparsight calibrate`."""
    return model_path() / "heads.json"
