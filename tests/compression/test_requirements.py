from dataclasses import replace

import pytest

from sparsight.compression import (
    BACON,
    Accumulated,
    FutureQueries,
    LastWindow,
    MixKV,
    PostVision,
    Recency,
    SparsityAware,
    TextGrounded,
    Uniform,
    VisualHeads,
)
from sparsight.compression.recipe import KINDS, Recipe
from sparsight.compression.requirements import LONG, needs, observed_queries
from sparsight.methods import SnapKV


def with_parts(**parts: object) -> Recipe:
    return replace(SnapKV(), **parts)


@pytest.mark.parametrize(
    ("parts", "needed", "queries"),
    [
        ({"score": PostVision()}, ["question"], "last"),
        ({"score": MixKV(LastWindow())}, ["question"], "last"),
        ({"score": TextGrounded()}, ["question"], "all"),
        ({"score": Accumulated()}, [], "all"),
        ({"score": MixKV(Accumulated())}, [], "all"),
        # It adds what the last query attends to.
        ({"score": BACON(Accumulated())}, ["question"], "all"),
        ({"score": FutureQueries()}, [], "all"),
        ({"score": Recency()}, [], "none"),
        # The sparsity is that of the post-vision queries.
        ({"score": Recency(), "allocate": SparsityAware()}, ["question"], "last"),
        ({"score": Recency(), "allocate": VisualHeads()}, ["calibration"], "none"),
    ],
)
def test_requirements_follow_from_the_parts(parts: dict[str, object], needed: list[str], queries: str) -> None:
    recipe = with_parts(**{"allocate": Uniform(), **parts})
    assert (needs(recipe), observed_queries(recipe)) == (needed, queries)


@pytest.mark.parametrize("kind", KINDS["score"])
def test_a_score_of_the_last_queries_alone_needs_the_question(kind: str) -> None:
    score = KINDS["score"][kind]()
    queries = score.queries(LONG)
    if queries and queries.start >= LONG.post_vision:
        assert score.needs_question
