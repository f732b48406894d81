"""What a recipe needs besides the prompt's image, and which queries it observes during the prefill."""

from sparsight.compression import TextVision, VisualHeads
from sparsight.compression.recipe import Recipe
from sparsight.models.prompt import Span

LONG = Span(0, 2**20, 2**21)
"""An image and a question, both longer than any window."""


def needs(recipe: Recipe) -> list[str]:
    """``question`` if the text after the image decides what stays, ``calibration`` if head scores are needed."""
    found = []
    if recipe.score.needs_question or _measures_question(recipe):
        found.append("question")
    if isinstance(recipe.allocate, VisualHeads):
        found.append("calibration")
    return found


def observed_queries(recipe: Recipe) -> str:
    """Which of the prompt's queries are observed beside the model's own attention: ``all``, the ``last``, ``none``."""
    queries = recipe.score.queries(LONG)
    if queries and queries.start < LONG.post_vision:
        return "all"
    return "last" if queries or _measures_question(recipe) else "none"


def _measures_question(recipe: Recipe) -> bool:
    """Whether the allocation goes by the attention of the post-vision queries."""
    return recipe.allocate.threshold is not None or isinstance(recipe.allocate, TextVision)
