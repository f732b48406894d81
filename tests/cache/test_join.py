"""Prompts that were compressed one by one and joined decode as each does alone."""

from types import SimpleNamespace

import pytest
from transformers.feature_extraction_utils import BatchFeature

from sparsight import RECIPES, CompressedCache, VLCache, recipe
from sparsight.batch_inference.generator import BatchGenerator
from sparsight.batch_inference.rows import Row
from tests.support import models
from tests.support.families import TINY
from tests.support.models import NO_IMAGE, ONE_IMAGE, TEXT_ONLY, THREE_IMAGES, Prompt, generate
from tests.support.recipes import recipe_for

TOKENS = 24
SHORT = Prompt(images=1, before=2, after=3)
LONG_TEXT = Prompt(images=0, before=40, after=3)
WORDS = SimpleNamespace(decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens)))
PREPARATION = SimpleNamespace(
    max_new_tokens=TOKENS, checkpoint=SimpleNamespace(processor=SimpleNamespace(tokenizer=WORDS))
)


def alone(model, inputs, chosen):
    cache = CompressedCache(model, chosen, inputs)
    (answer,) = generate(model, inputs, TOKENS, past_key_values=cache)
    return " ".join(map(str, answer.tolist())), cache


def check(family, chosen, prompts, batch_size=None):
    model = models.model(family)
    every = [models.inputs(family, prompt, seed=index) for index, prompt in enumerate(prompts)]
    generator = BatchGenerator(model, PREPARATION, chosen(model), batch_size)
    # Rows of all lengths together: here it is the padding that is tested.
    generator._length_group = lambda length: 0
    given = ((Row(str(index)), BatchFeature(inputs)) for index, inputs in enumerate(every))
    results = {result.id: result for some in generator.generate(given) for result in some}
    for index, inputs in enumerate(every):
        text, cache = alone(model, inputs, chosen(model))
        found = results[str(index)]
        assert found.text == text
        assert (found.prompt_tokens, found.tokens) == (inputs["input_ids"].shape[1], TOKENS)
        kept = cache.report().kept_per_layer()
        assert found.kept == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("family", [*TINY, *TEXT_ONLY])
def test_in_every_family(family):
    prompts = [NO_IMAGE, LONG_TEXT] if family in TEXT_ONLY else [ONE_IMAGE, THREE_IMAGES, SHORT, ONE_IMAGE]
    check(family, lambda model: VLCache(budget=0.2), prompts)


# The random one draws anew for every cache.
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "random"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_with_every_recipe(family, name):
    check(family, lambda model: recipe_for(model, name, budget=0.3), [ONE_IMAGE, THREE_IMAGES, SHORT])


@pytest.mark.parametrize("decode", ["grow", "fixed-point", "sliding", "heavy-hitter"])
@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_with_every_decode_rule_and_storage(name, decode):
    window = {"window": 4} if name == "adakv" else {}
    chosen = recipe(name, budget=0.3, **window).combined(decode=decode)
    check("llava", lambda model: chosen, [THREE_IMAGES, ONE_IMAGE, SHORT, THREE_IMAGES])


def test_what_was_joined_is_reported_and_the_parts_wait_again():
    model = models.model("llava")
    every = [models.inputs("llava", prompt, seed=index) for index, prompt in enumerate([ONE_IMAGE, THREE_IMAGES])]
    caches = [CompressedCache(model, VLCache(budget=0.2), inputs) for inputs in every]
    for inputs, cache in zip(every, caches, strict=True):
        generate(model, inputs, 1, past_key_values=cache)
    before = [cache.report() for cache in caches]
    positions = [cache.kept_positions(1) for cache in caches]
    joined = CompressedCache.join(caches)
    report = joined.report()
    assert report.prompt_tokens == [length for part in before for length in part.prompt_tokens]
    assert report.vision_tokens == [count for part in before for count in part.vision_tokens]
    assert report.kept == [[row for part in before for row in part.kept[layer]] for layer in range(len(report.kept))]
    assert report.sparsity == [
        [row for part in before for row in part.sparsity[layer]] for layer in range(len(report.sparsity))
    ]
    assert report.tokens_seen == max(part.tokens_seen for part in before)
    for row, (part, kept) in enumerate(zip(before, positions, strict=True)):
        later = report.tokens_seen - part.tokens_seen
        assert joined.kept_positions(1)[row, :, : kept.shape[2]].tolist() == (kept[0] + later).tolist()
    assert [cache.nbytes for cache in caches] == [0, 0]
    for inputs, cache in zip(every, caches, strict=True):
        assert generate(model, inputs, 4, past_key_values=cache).shape == (1, 4)


def test_caches_that_do_not_belong_together_are_refused():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)

    def cache(chosen, tokens, model=model):
        made = CompressedCache(model, chosen, inputs)
        if tokens:
            generate(model, inputs, tokens, past_key_values=made)
        return made

    tenth = VLCache(budget=0.1)
    with pytest.raises(ValueError, match="one model and one recipe"):
        CompressedCache.join([cache(tenth, 1), cache(VLCache(budget=0.2), 1)])
    with pytest.raises(ValueError, match="one model and one recipe"):
        CompressedCache.join([cache(tenth, 1), cache(tenth, 1, models.fresh_model("llava"))])
    for tokens in (0, 2):
        with pytest.raises(ValueError, match="have seen their prompts and nothing more"):
            CompressedCache.join([cache(tenth, 1), cache(tenth, tokens)])
