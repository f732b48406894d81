"""Every published method equals the brute force that is written from its paper's definitions."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from sparsight import CompressedCache, ElasticCache, VLCache, recipe
from sparsight.cache import layer as layers
from sparsight.models.prompt import locate
from tests.support import families, models, reference
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES
from tests.support.reference import Method

BATCHES = {
    "one image": (ONE_IMAGE,),
    "three images": (THREE_IMAGES,),
    "no text after the image": (NO_TEXT_AFTER,),
    "no image": (NO_IMAGE,),
    "padded batch": (ONE_IMAGE, THREE_IMAGES, NO_TEXT_AFTER),
    "padded batch with text only": (NO_IMAGE, ONE_IMAGE, THREE_IMAGES),
}
VISUAL_HEADS = ((0.1, 3.0), (0.5, 0.2), (0.9, 0.4))
FOUR_HEADS = ((0.1, 3.0, 0.7, 0.0), (0.5, 0.2, 0.1, 1.5), (0.9, 0.4, 0.0, 0.3))
METHODS = {
    "vl-cache": (VLCache(budget=0.1), Method("vl-cache", 0.1)),
    "vl-cache at 40 %": (VLCache(budget=0.4), Method("vl-cache", 0.4)),
    "vl-cache as published": (
        VLCache(budget=0.2, water_fill=False, per_head=False),
        Method("vl-cache", 0.2, water_fill=False, per_head=False),
    ),
    "vl-cache, other numbers": (
        VLCache(budget=0.3, threshold=0.1, recent=0.5),
        Method("vl-cache", 0.3, threshold=0.1, recent=0.5),
    ),
    "elastic": (ElasticCache(budget=0.1), Method("elastic", 0.1)),
    "elastic, short distance": (
        ElasticCache(budget=0.5, distance=4, protect_first=3),
        Method("elastic", 0.5, distance=4, protect_first=3),
    ),
    "elastic, one entry": (
        ElasticCache(budget=0.001, distance=3, protect_first=4),
        Method("elastic", 0.001, distance=3, protect_first=4),
    ),
    "h2o": (recipe("h2o", budget=0.2), Method("h2o", 0.2, recent=0.5)),
    "h2o, half": (recipe("h2o", budget=0.5, recent=0.2), Method("h2o", 0.5, recent=0.2)),
    "streaming-llm": (recipe("streaming-llm", budget=0.2), Method("streaming-llm", 0.2)),
    "streaming-llm, few entries": (recipe("streaming-llm", budget=0.05), Method("streaming-llm", 0.05)),
    "snapkv": (recipe("snapkv", budget=0.6), Method("snapkv", 0.6)),
    "snapkv, small window": (recipe("snapkv", budget=0.3, window=4, pool=3), Method("snapkv", 0.3, window=4, pool=3)),
    "snapkv, few entries": (recipe("snapkv", budget=0.1), Method("snapkv", 0.1)),
    "pyramidkv, few entries": (recipe("pyramidkv", budget=0.1), Method("pyramidkv", 0.1, window=8)),
    "adakv, few entries": (recipe("adakv", budget=0.1), Method("adakv", 0.1)),
    "sparsemm, few entries": (
        recipe("sparsemm", budget=0.1, heads=VISUAL_HEADS),
        Method("sparsemm", 0.1, head_scores=VISUAL_HEADS, pool=5, pooling="average"),
    ),
    "snapkv, one entry": (recipe("snapkv", budget=0.001), Method("snapkv", 0.001)),
    "pyramidkv": (recipe("pyramidkv", budget=0.3, window=5), Method("pyramidkv", 0.3, window=5)),
    "pyramidkv, full first layer": (
        recipe("pyramidkv", budget=0.56, window=2),
        Method("pyramidkv", 0.56, window=2),
    ),
    "pyramidkv, above half": (recipe("pyramidkv", budget=0.7), Method("pyramidkv", 0.7, window=8)),
    "prefixkv": (recipe("prefixkv", budget=0.2), Method("prefixkv", 0.2)),
    "prefixkv, short distance": (recipe("prefixkv", budget=0.5, distance=6), Method("prefixkv", 0.5, distance=6)),
    "prefixkv, one entry": (recipe("prefixkv", budget=0.001), Method("prefixkv", 0.001)),
    "look-m": (recipe("look-m", budget=0.2), Method("look-m", 0.2, recent=0.5)),
    "look-m, averaged": (
        recipe("look-m", budget=0.3, merge="averaged", recent=0.2),
        Method("look-m", 0.3, merge="averaged", recent=0.2),
    ),
    "look-m, weighted": (
        recipe("look-m", budget=0.3, merge="weighted"),
        Method("look-m", 0.3, merge="weighted", recent=0.5),
    ),
    "adakv": (recipe("adakv", budget=0.3, window=4, pool=3), Method("adakv", 0.3, window=4, pool=3)),
    "adakv, no floor": (
        recipe("adakv", budget=0.5, floor=0, window=6),
        Method("adakv", 0.5, floor_of_heads=0, window=6),
    ),
    "adakv in a ring": (
        recipe("adakv", budget=0.4, window=4).combined(decode="sliding"),
        Method("adakv", 0.4, window=4, decode="sliding"),
    ),
    "aircache": (recipe("aircache", budget=0.5), Method("aircache", 0.5, recent=0)),
    "aircache, small elite": (
        recipe("aircache", budget=0.7, threshold=1.0),
        Method("aircache", 0.7, recent=0, elite=1.0),
    ),
    "sparsight": (recipe("sparsight", budget=0.2), Method("sparsight", 0.2, recent=0)),
    "sparsight, tall window": (
        recipe("sparsight", budget=0.4, height=3, width=3, weight=0.6, floor=0.5),
        Method("sparsight", 0.4, recent=0, height=3, width=3, weight=0.6, floor_of_all=0.5),
    ),
    "sparsight-recall": (
        recipe("sparsight-recall", budget=0.2),
        Method("sparsight", 0.2, recent=0, floor_of_all=0.6, decode="recall", prior=1.0),
    ),
    "sparsight-recall for every token": (
        recipe("sparsight-recall", budget=0.1, every=1, pool=(3, 3), prior=0.3, width=7, weight=0.4),
        Method(
            "sparsight",
            0.1,
            recent=0,
            floor_of_all=0.6,
            width=7,
            weight=0.4,
            decode="recall",
            every=1,
            window_of_recall=(3, 3),
            prior=0.3,
        ),
    ),
    "vl-cache with recall": (
        VLCache(budget=0.1, recent=0.5).combined(decode="recall"),
        Method("vl-cache", 0.1, recent=0.5, decode="recall"),
    ),
    "sparsight, one entry": (recipe("sparsight", budget=0.001, floor=0), Method("sparsight", 0.001, recent=0)),
    "sparsemm": (
        recipe("sparsemm", budget=0.4, heads=VISUAL_HEADS, window=4),
        Method("sparsemm", 0.4, head_scores=VISUAL_HEADS, window=4, pool=5, pooling="average"),
    ),
    "sparsemm, full heads": (
        recipe("sparsemm", budget=0.8, heads=VISUAL_HEADS, window=4, pool=3, pooling="max", equal=0.3),
        Method("sparsemm", 0.8, head_scores=VISUAL_HEADS, window=4, pool=3, equal=0.3),
    ),
}
WITH_FOUR_HEADS = {
    "sparsemm, four heads": (
        recipe("sparsemm", budget=0.4, heads=FOUR_HEADS, window=4),
        Method("sparsemm", 0.4, head_scores=FOUR_HEADS, window=4, pool=5, pooling="average"),
    ),
}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 5e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2}}
LOGITS = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 0.1, "atol": 0.25}}


def check(family, heads, dtype, batch, method, tokens=8, model=None, blocks_of=None):
    chosen, twin_method = {**METHODS, **WITH_FOUR_HEADS}[method]
    model = model or models.model(family, heads, dtype)
    inputs = models.inputs(family, *BATCHES[batch], dtype=dtype)
    vision = locate(model.config, inputs).vision_mask
    blocks = blocks_of(inputs) if blocks_of else None
    grids = [[grid.tolist() for grid in row] for row in locate(model.config, inputs, grids=True).grids]
    twin, expected = reference.run(model, inputs, twin_method, tokens, vision, blocks, grids)

    with pytest.MonkeyPatch.context() as patch:
        if dtype != torch.float32:
            # The twin's attention is torch's, which rounds otherwise than ours: entries of later layers would differ.
            patch.setattr(layers, "is_plain", lambda *_, **__: False)
        compare(model, inputs, chosen, twin, expected, dtype, tokens)


def compare(model, inputs, chosen, twin, expected, dtype, tokens):
    """Entries and logits after the prefill and after ``tokens`` of the answer."""
    cache = CompressedCache(model, chosen, inputs)
    first = models.logits(model, inputs, 1, past_key_values=cache)
    assert_close(first[0], expected.logits[0], **LOGITS[dtype])
    check_entries(cache, twin, twin.kept, dtype)

    cache = CompressedCache(model, chosen, inputs)
    logits = models.logits(model, inputs, tokens, past_key_values=cache)
    if dtype == torch.float32:
        for own, brute in zip(logits, expected.logits, strict=True):
            assert_close(own, brute, **LOGITS[dtype])
        check_entries(cache, twin, twin.rows, dtype)
    else:
        # Rounding flips near-ties, after which the answers differ: the first decoded token is still comparable.
        same = logits[0].argmax(-1) == expected.logits[0].argmax(-1)
        assert same.any()
        assert_close(logits[1][same], expected.logits[1][same], **LOGITS[dtype])


def check_entries(cache, twin, rows, dtype):
    """Sparsity, budgets, kept positions, and the keys and values of every entry."""
    for index in range(len(cache.layers)):
        if cache.report().sparsity is not None:
            assert_close(cache.report().sparsity[index], twin.sparsity[index], rtol=0, atol=1e-6)
        held = cache.report().held[index]
        for b, row in enumerate(rows[index]):
            for h, head in enumerate(row.heads):
                positions, keys, values = cache.entries(index, b, h)
                assert positions.tolist() == [entry.position for entry in head]
                assert held[b][h] == len(head)
                assert_close(keys, torch.stack([entry.key for entry in head]), **TOLERANCE[dtype])
                assert_close(values, torch.stack([entry.value for entry in head]), **TOLERANCE[dtype])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_kind_of_prompt(batch, method):
    check("llava", "1:2", torch.float32, batch, method)


@pytest.mark.parametrize("method", ["vl-cache", "elastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", ["1:1", "1:2", "1:8"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_grouping_and_dtype(family, heads, dtype, method):
    check(family, heads, dtype, "padded batch", method)


@pytest.mark.parametrize(
    "method",
    [
        "h2o",
        "streaming-llm",
        "snapkv",
        "pyramidkv",
        "prefixkv",
        "look-m",
        "adakv",
        "aircache",
        "sparsight",
        "sparsight-recall",
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", ["1:1", "1:8"])
def test_other_methods_with_other_heads_and_dtypes(heads, dtype, method):
    check("qwen2_5_vl", heads, dtype, "padded batch", method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "method"), [("1:2", "sparsemm"), ("1:1", "sparsemm, four heads")])
def test_visual_heads_with_other_heads_and_dtypes(heads, method, dtype):
    check("qwen2_5_vl", heads, dtype, "padded batch", method)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_that_is_seen_in_both_directions(method):
    check(
        "paligemma", "1:2", torch.float32, "padded batch", method,
        blocks_of=lambda inputs: torch.zeros_like(inputs["input_ids"]).tolist(),
    )  # fmt: skip


@pytest.mark.parametrize("batch", ["three images", "no text after the image", "padded batch with text only"])
@pytest.mark.parametrize("method", ["vl-cache", "elastic", "h2o", "snapkv", "prefixkv"])
def test_pictures_that_are_seen_in_both_directions(method, batch, gemma3_without_windows):
    # One picture's tokens are one block; between two pictures there is a token.
    def blocks_of(inputs):
        rows = []
        for row in (inputs["input_ids"] == families.IMAGE_TOKEN).tolist():
            starts = itertools.accumulate(flag and not before for before, flag in itertools.pairwise([False, *row]))
            rows.append([number if flag else -1 for number, flag in zip(starts, row, strict=True)])
        return rows

    check("gemma3", "1:2", torch.float32, batch, method, model=gemma3_without_windows, blocks_of=blocks_of)


@pytest.fixture(scope="module")
def gemma3_without_windows():
    torch.manual_seed(3)
    model = families.gemma3_without_windows("1:2").eval()
    model.generation_config.eos_token_id = None
    return model


def test_long_answers_of_heavy_hitters():
    check("llava", "1:2", torch.float32, "padded batch", "h2o", tokens=60)


def test_long_answers_in_a_sliding_window():
    check("llava", "1:2", torch.float32, "padded batch", "streaming-llm", tokens=60)
    check("llava", "1:2", torch.float32, "padded batch", "adakv in a ring", tokens=60)


def test_long_answers_with_recall():
    check("qwen2_5_vl", "1:2", torch.float32, "padded batch", "sparsight-recall", tokens=40)


def test_long_answers_under_the_fixed_point():
    check("llava", "1:2", torch.float32, "padded batch", "elastic, short distance", tokens=120)
    check("llava", "1:2", torch.float32, "padded batch", "prefixkv, short distance", tokens=120)


@pytest.mark.parametrize("family", [*models.FAMILIES, "paligemma"])
def test_full_attention_of_the_brute_force_is_the_models_own(family):
    model = models.fresh_model(family)
    inputs = models.inputs(family, *BATCHES["padded batch"])
    blocks = torch.zeros_like(inputs["input_ids"]).tolist() if family == "paligemma" else None
    twin = reference.Twin(Method("vl-cache", 1.0), [], inputs["attention_mask"].bool().tolist(), blocks)
    twin.compress = lambda: None
    with torch.no_grad(), reference.attention_by(model, twin):
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    for own, brute in zip(attentions, twin.attention, strict=True):
        valid = inputs["attention_mask"].bool()[:, None, :, None]
        assert_close(brute.masked_fill(~valid, 0), own.masked_fill(~valid, 0), rtol=1e-5, atol=1e-5)
