"""Files with head scores, which say how much each KV head of a model reads text in images."""

import json
from pathlib import Path

from sparsight.utils.text import printable

HeadScores = tuple[tuple[float, ...], ...]
"""The score of each compressed layer's KV heads."""


def read_scores(path: str | Path) -> HeadScores:
    """Head scores from a file that ``sparsight calibrate`` wrote.

    Raises:
        ValueError: there is no such file, or it does not hold head scores.
    """
    name = printable(path)
    try:
        return tuple(tuple(map(float, layer)) for layer in json.loads(Path(path).read_text())["scores"])
    except OSError as error:
        raise ValueError(f"There is no file {name} with head scores: `sparsight calibrate` writes one.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} holds no head scores: `sparsight calibrate` writes a file that does.") from error
