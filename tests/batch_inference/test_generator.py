"""Rows of every family and method that decode together: each gets the answer that it gets alone."""

from types import SimpleNamespace

import pytest

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


class Numbers:
    """A tokenizer whose text is the numbers of the tokens."""

    unk_token_id = None

    def __init__(self):
        self.added_tokens_decoder = {}

    def __len__(self):
        return 10**6

    def convert_tokens_to_ids(self, tokens):
        return [None] * len(tokens)

    def decode(self, tokens, **options):
        return " ".join(map(str, tokens))


PREPROCESSOR = SimpleNamespace(
    max_new_tokens=TOKENS, checkpoint=SimpleNamespace(processor=SimpleNamespace(tokenizer=Numbers()))
)


def alone(model, inputs, chosen):
    cache = CompressedCache(model, chosen, inputs)
    (answer,) = generate(model, inputs, TOKENS, past_key_values=cache)
    return " ".join(map(str, answer.tolist())), cache


def check(family, chosen, prompts):
    model = models.model(family)
    every = [models.inputs(family, prompt, seed=index) for index, prompt in enumerate(prompts)]
    generator = BatchGenerator(model, PREPROCESSOR, chosen(model))
    given = ((Row(str(index)), inputs) for index, inputs in enumerate(every))
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
def test_with_every_decode_rule(name, decode):
    window = {"window": 4} if name == "adakv" else {}
    chosen = recipe(name, budget=0.3, **window).combined(decode=decode)
    check("llava", lambda model: chosen, [THREE_IMAGES, ONE_IMAGE, SHORT, THREE_IMAGES])
