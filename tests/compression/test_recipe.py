import dataclasses
import json
import re
from pathlib import Path

import pytest

from sparsight import RECIPES, CompressedCache, ElasticCache, Recipe, VLCache, recipe
from sparsight.compression import (
    BACON,
    Accumulated,
    AcrossHeads,
    EliteWindow,
    Evict,
    FixedPoint,
    Grow,
    LastWindow,
    MergeNearest,
    MixKV,
    PostVision,
    Recency,
    SparsityAware,
    Uniform,
)
from sparsight.methods import Full
from tests.support import models


def test_vl_cache_has_its_papers_parts_and_numbers():
    assert VLCache() == Recipe(
        "vl-cache", 0.1, PostVision(), SparsityAware(threshold=0.01), Evict(recent=0.1, per_head=True), Grow()
    )


def test_elastic_has_its_papers_parts_and_numbers():
    assert ElasticCache() == Recipe(
        "elastic",
        0.1,
        Accumulated(),
        Uniform(),
        MergeNearest(protect_first=1),
        FixedPoint(distance=25, protect_first=1),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name):
    made = recipe(name, budget=1 if name == "full" else 0.25, **({"heads": [[0.5, 1.0]]} if name == "sparsemm" else {}))
    assert made.name == name
    assert Recipe.from_json(made.to_json()) == made
    assert json.loads(made.to_json())["score"]["kind"] == made.score.kind


def test_parts_combine_freely():
    mixed = dataclasses.replace(VLCache(budget=0.2), name="mixed", reduce=MergeNearest(), decode=FixedPoint(distance=3))
    assert Recipe.from_json(mixed.to_json()) == mixed
    assert mixed != VLCache(budget=0.2)
    assert "distance=3" in repr(mixed)


def test_parts_combine_by_kind():
    mixed = VLCache(budget=0.2).combined(reduce="merge-nearest", decode="fixed-point", score=None)
    assert mixed.name == "vl-cache + merge-nearest + fixed-point"
    assert (mixed.score, mixed.reduce, mixed.decode) == (PostVision(), MergeNearest(), FixedPoint())
    assert VLCache().combined(score=None) == VLCache()
    with pytest.raises(ValueError, match="Unknown reduce 'merge-nerest': did you mean 'merge-nearest'"):
        VLCache().combined(reduce="merge-nerest")


def test_scores_wrap_scores():
    assert VLCache().combined(score="mixkv:post-vision").score == MixKV(PostVision())
    assert VLCache().combined(score="mixkv:bacon:accumulated").score == MixKV(BACON(Accumulated()))
    assert VLCache().combined(score="bacon").score == BACON(LastWindow(pool=5, pooling="average"))
    assert VLCache().combined(score="mixkv:elite-window").name == "vl-cache + mixkv:elite-window"
    nested = dataclasses.replace(VLCache(), score=MixKV(BACON(PostVision(pool=(1, 5)))))
    assert Recipe.from_json(nested.to_json()) == nested
    assert nested.score.pool == (1, 5)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ("post-vision:recency", "Score 'post-vision' wraps no other: 'post-vision:recency' must be 'post-vision'."),
        ("mixkv:post-vison", "Unknown score 'post-vison': did you mean 'post-vision'"),
        ("mixkv:", "Unknown score ''"),
        ("bacon:recency", "which 'recency' is not: take last-window, post-vision or accumulated."),
    ],
)
def test_scores_that_cannot_be_wrapped_are_refused(kinds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VLCache().combined(score=kinds)


def test_only_scores_can_be_wrapped():
    assert MixKV(Recency()) != MixKV(EliteWindow())
    with pytest.raises(ValueError, match=re.escape("Score 'mixkv' wraps another score such as PostVision(), got 3.")):
        MixKV(3)


def test_heads_that_choose_together_cannot_hold_different_numbers():
    with pytest.raises(ValueError, match=r"'across-heads' .* under reduction 'merge-nearest' as configured the heads"):
        ElasticCache().combined(allocate="across-heads")
    assert recipe("adakv").combined(score="post-vision").allocate == AcrossHeads()


@pytest.mark.parametrize("heads", [[[0.1, 0.2], [0.3]], [[0.1, -1.0]], [[float("nan")]]])
def test_head_scores_that_are_none_are_refused(heads):
    with pytest.raises(ValueError, match="scores must be as many numbers of at least 0 for every layer"):
        recipe("sparsemm", heads=heads)


def test_the_guides_example_is_a_method():
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "TextFirst" in code)
    names: dict = {}
    exec(example, names)
    model, inputs = models.model("llava"), models.inputs("llava", models.ONE_IMAGE)
    made = names["TextFirst"](budget=0.3)
    assert Recipe.from_json(made.to_json()) == made
    cache = CompressedCache(model, made, inputs)
    models.generate(model, inputs, 4, past_key_values=cache)
    assert cache.report().kept == [[[round(0.3 * 31)] * 2]] * 3


@pytest.mark.parametrize(
    ("budget", "length", "window"), [(1.0, 620, 32), (0.1, 480, 32), (0.1, 470, 31), (0.01, 620, 4), (0.01, 30, 1)]
)
@pytest.mark.parametrize("name", ["snapkv", "adakv", "sparsemm"])
def test_a_window_takes_two_thirds_of_the_entries_kept_at_most(name, budget, length, window):
    fitted = recipe(name, budget=budget).fitted(length, 0)
    assert fitted.score.window == fitted.reduce.last == window


@pytest.mark.parametrize("name", ["vl-cache", "elastic", "h2o", "streaming-llm", "prefixkv", "look-m", "aircache"])
def test_a_recipe_without_a_window_is_the_same_for_every_length(name):
    assert recipe(name, budget=0.01).fitted(100, 0) == recipe(name, budget=0.01)


def test_a_vision_budget_adds_the_text_of_each_prompt():
    chosen = dataclasses.replace(recipe("aircache", budget=0.25), vision_budget=True)
    assert Recipe.from_json(chosen.to_json()) == chosen
    assert chosen.fitted(100, 80) == recipe("aircache", budget=0.4)
    assert chosen.fitted(100, 0).budget == 1.0


@pytest.mark.parametrize("name", ["aircache", "look-m"])
def test_a_vision_budget_keeps_all_text_and_a_share_of_the_vision_tokens(name):
    model, inputs = models.model("llava"), models.inputs("llava", models.ONE_IMAGE, models.THREE_IMAGES)
    chosen = dataclasses.replace(recipe(name, budget=0.25), vision_budget=True)
    cache = CompressedCache(model, chosen, inputs)
    models.generate(model, inputs, 1, past_key_values=cache)
    for layer in range(3):
        for b, valid in enumerate(cache.prompt.valid_mask):
            text = (valid & ~cache.prompt.vision_mask[b]).nonzero()[:, 0].tolist()
            for head in cache.kept_positions(layer)[b].tolist():
                assert set(text) <= set(head)
    report = cache.report()
    for b, (length, vision) in enumerate(zip(report.prompt_tokens, report.vision_tokens, strict=True)):
        kept = [count for layer in report.kept for count in layer[b]]
        # Half an entry in each layer by rounding.
        assert abs(sum(kept) / len(kept) - (length - vision + 0.25 * vision)) <= 0.5


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VLCache().budget = 0.5


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan"), "10 %", None])
@pytest.mark.parametrize("name", RECIPES)
def test_a_budget_out_of_range_is_refused(name, budget):
    with pytest.raises(ValueError, match=r"budget must be a number in \(0, 1\]"):
        recipe(name, budget=budget)


@pytest.mark.parametrize("budget", [0.1, 0.999])
def test_the_full_cache_has_no_budget_below_one(budget):
    for build in (Full, lambda budget: recipe("full", budget=budget)):
        with pytest.raises(ValueError, match=f"^The full cache keeps every entry, so its budget is 1, got {budget}: "):
            build(budget)
    assert Full() == recipe("full") == recipe("full", budget=1) == Full(1.0)
    assert Full().budget == 1.0


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Unknown method 'vlcache': did you mean 'vl-cache'"):
        recipe("vlcache")
    with pytest.raises(ValueError, match="Unknown method 'zzz': known are vl-cache, elastic, h2o"):
        recipe("zzz")


def test_local_is_another_name_of_streaming_llm():
    assert recipe("local", budget=0.2) == recipe("streaming-llm", budget=0.2)


def test_an_unknown_number_is_refused():
    with pytest.raises(ValueError, match=r"'elastic': .*'threshold'"):
        recipe("elastic", threshold=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": {"kind": "post-visoin"}}, "Unknown score 'post-visoin': did you mean 'post-vision'"),
        ({"decode": {"kind": "grow", "speed": 3}}, "Not a recipe"),
        ({"allocate": {}}, "Not a recipe: 'kind'"),
        ({"budget": 3}, "budget must be"),
    ],
)
def test_json_that_is_no_recipe_is_refused(change, message):
    data = {**json.loads(VLCache().to_json()), **change}
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(json.dumps(data))
