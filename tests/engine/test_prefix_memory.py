"""Prompts that begin like earlier ones: the answers are the same, and only what differs is computed."""

import random
from collections import Counter
from functools import cache

import pytest
import torch

from sparsight import RECIPES, SamplingParams
from sparsight.cache.host_copy import HostCopy
from sparsight.engine.positions import prompt_positions
from sparsight.engine.prefix_memory import PrefixMemory
from sparsight.engine.prompt_chain import chain_of
from sparsight.engine.vision_cache import VisionCache
from tests.engine.requests import engine
from tests.support import models, processors
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, ONE_VIDEO, THREE_IMAGES
from tests.support.recipes import recipe_for

PARAMS = SamplingParams(max_new_tokens=4)
TURNS = [[3, 4, 5], [3, 4, 6, 7, 8], [9, 2]]


def asked(running, family, inputs, method="sparsight", **options):
    recipe = recipe_for(models.model(family), method, budget=0.3)
    return running.add(inputs=inputs, recipe=recipe, params=PARAMS, **options).wait()[0]


def outcome(completion):
    return completion.token_ids, completion.report.kept, completion.report.prompt_tokens


def continued(inputs, *turns):
    """The prompt with text after it."""
    new = torch.tensor([[token for turn in turns for token in turn]], dtype=torch.long)
    longer = {"input_ids": torch.cat([inputs["input_ids"], new], dim=1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, new.shape[1]), value=int(name == "attention_mask"))
    return {**inputs, **longer}


@pytest.fixture
def encoded(monkeypatch):
    """How many images are encoded."""
    counts = Counter()
    run = VisionCache._run

    def counted(self, encoder, images, sizes):
        counts["images"] += len(images)
        return run(self, encoder, images, sizes)

    monkeypatch.setattr(VisionCache, "_run", counted)
    return counts


@pytest.mark.parametrize("family", [*models.FAMILIES, "internvl", "idefics3", "qwen3_vl", "llama"])
@pytest.mark.parametrize("chunk", [None, 11])
def test_answers_are_those_without_reuse(family, chunk):
    prompts = [NO_IMAGE] if family == "llama" else [ONE_IMAGE, THREE_IMAGES, NO_TEXT_AFTER]
    with (
        engine(family, host_memory=2**24, prefill_chunk=chunk) as reusing,
        engine(family, prefill_chunk=chunk) as plain,
    ):
        for prompt in prompts:
            first = models.inputs(family, prompt)
            for inputs in (first, continued(first, *TURNS[:1]), continued(first, *TURNS[1:])):
                for method in ("sparsight", "streaming-llm"):
                    own = asked(reusing, family, inputs, method)
                    assert outcome(own) == outcome(asked(plain, family, inputs, method))
        assert own.reused_tokens >= first["input_ids"].shape[1]


@pytest.mark.parametrize("method", [name for name in RECIPES if name != "full"])
def test_every_method_answers_as_without_reuse(method):
    first = models.inputs("llava", ONE_IMAGE)
    with engine(host_memory=2**24) as reusing, engine() as plain:
        asked(reusing, "llava", first)
        inputs = continued(first, *TURNS[:2])
        assert outcome(asked(reusing, "llava", inputs, method)) == outcome(asked(plain, "llava", inputs, method))


def test_videos_are_reused():
    first = models.inputs("qwen2_5_vl", ONE_VIDEO)
    with engine("qwen2_5_vl", host_memory=2**24) as reusing, engine("qwen2_5_vl") as plain:
        asked(reusing, "qwen2_5_vl", first)
        inputs = continued(first, TURNS[0])
        own = asked(reusing, "qwen2_5_vl", inputs, "infinipot-v")
        assert outcome(own) == outcome(asked(plain, "qwen2_5_vl", inputs, "infinipot-v"))
        assert own.reused_tokens == first["input_ids"].shape[1]


def test_what_is_reused_ends_before_the_first_query_that_the_method_looks_at():
    first = models.inputs("llava", ONE_IMAGE)
    image_end = first["input_ids"].shape[1] - ONE_IMAGE.after
    with engine(host_memory=2**24) as running:
        reused = [asked(running, "llava", first).reused_tokens]
        for method in ("sparsight", "streaming-llm", "h2o"):
            reused.append(asked(running, "llava", continued(first, TURNS[0]), method).reused_tokens)
    # After the first of them the memory has the longer prompt, whose last two tokens give the answer's first logits.
    assert reused == [0, image_end, first["input_ids"].shape[1] + 1, 0]


def test_images_in_what_is_reused_are_not_encoded(encoded):
    first = models.inputs("llava", ONE_IMAGE)
    more = models.inputs("llava", THREE_IMAGES, seed=1)
    both = {"input_ids": torch.cat([first["input_ids"], more["input_ids"]], dim=1)}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    both["pixel_values"] = torch.cat([first["pixel_values"], more["pixel_values"]])
    with engine(host_memory=2**24, vision_bytes=0) as running:
        asked(running, "llava", first)
        assert encoded["images"] == 1
        asked(running, "llava", continued(first, TURNS[0]))
        assert encoded["images"] == 1
        assert asked(running, "llava", both).reused_tokens == first["input_ids"].shape[1]
        assert encoded["images"] == 4


def test_prompts_of_another_salt_share_nothing():
    inputs = models.inputs("llava", ONE_IMAGE)
    with engine(host_memory=2**24) as running:
        reused = [asked(running, "llava", inputs, salt=salt).reused_tokens for salt in ("one", "two", "", "one")]
    assert reused[:3] == [0, 0, 0]
    assert reused[3] > 0


@pytest.mark.parametrize("family", models.FAMILIES)
def test_an_image_that_differs_in_one_pixel_is_another(family):
    inputs = models.inputs(family, THREE_IMAGES)
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    # In the last image: those before it are the same.
    other["pixel_values"].view(-1)[-1] += 1e-3
    vision = (models.model(family).config.image_token_id == inputs["input_ids"][0]).nonzero()[:, 0]
    with engine(family, host_memory=2**24) as running:
        asked(running, family, inputs)
        reused = asked(running, family, other, "streaming-llm").reused_tokens
        assert vision[0] < reused < vision[-1]
        assert reused < inputs["input_ids"].shape[1] - 2


def test_an_image_that_was_processed_otherwise_is_another():
    from PIL import Image

    image = Image.radial_gradient("L").convert("RGB")
    processor = processors.processor("llava")
    prepared = []
    for mean in (0.5, 0.4):
        processor.image_processor.image_mean = [mean] * 3
        prepared.append(dict(processor(images=image, text="ab<image>cd", return_tensors="pt")))
    assert torch.equal(prepared[0]["input_ids"], prepared[1]["input_ids"])
    token = processor.image_token_id
    model = models.model("llava")
    for each in prepared:
        each["input_ids"] = torch.where(
            each["input_ids"] == token, model.config.image_token_id, each["input_ids"] % 100
        )
    before = int((prepared[0]["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    with engine(host_memory=2**24) as running:
        asked(running, "llava", prepared[0], "streaming-llm")
        assert asked(running, "llava", prepared[1], "streaming-llm").reused_tokens == before


def test_random_requests_over_a_small_memory():
    """Conversations about images that differ little: the answers are those without reuse, within the bound."""
    draw = random.Random(7)
    images = [models.inputs("llava", ONE_IMAGE)]
    images.append({**images[0], "pixel_values": images[0]["pixel_values"].clone()})
    images[1]["pixel_values"].view(-1)[0] += 0.5
    images.append(models.inputs("llava", THREE_IMAGES))
    images.append(models.inputs("llava", NO_IMAGE))

    @cache
    def expected(image, turns, method):
        with engine() as plain:
            return outcome(asked(plain, "llava", continued(images[image], *(TURNS[turn] for turn in turns)), method))

    hits = 0
    with engine(host_memory=80_000) as running:
        for _ in range(100):
            image, turns = draw.randrange(len(images)), tuple(draw.choices(range(len(TURNS)), k=draw.randrange(3)))
            method = draw.choice(["sparsight", "streaming-llm", "vl-cache", "h2o"])
            inputs = continued(images[image], *(TURNS[turn] for turn in turns))
            own = asked(running, "llava", inputs, method, salt=draw.choice("ab"))
            assert outcome(own) == expected(image, turns, method)
            hits += own.reused_tokens > 0
            prefixes = running.prefixes
            held = [own for each in prefixes._prefixes.values() for own in each.own.layers]
            storage = sum(states.untyped_storage().nbytes() for layer in held for states in layer)
            assert storage == prefixes.nbytes <= 80_000
    assert hits > 20
    assert len(prefixes) > 1


def states(tokens, layers=2):
    copied = HostCopy()
    for _ in range(layers):
        copied.add_layer(*torch.randn(2, 2, tokens, 4))
    return copied


def chain(*tokens, salt=""):
    ids = torch.tensor([tokens])
    return chain_of(ids, torch.arange(len(tokens))[None], {}, salt)


def test_what_prompts_have_in_common_is_held_once():
    memory = PrefixMemory(10**6)
    first, second = states(4), states(6)
    memory.put(chain(1, 2, 3, 4), first, {})
    memory.put(chain(1, 2, 3, 5, 6, 7), second, {})
    assert memory.nbytes == first.nbytes + second.nbytes // 2
    found = memory.find(chain(1, 2, 3, 5, 6, 8))
    assert found.tokens == 5
    for layer in range(2):
        for own, one, two in zip(found.states(layer), first.states(layer), second.states(layer), strict=True):
            assert torch.equal(own, torch.cat([one[:, :3], two[:, 3:5]], dim=1))
    assert memory.find(chain(1, 2, 9)).tokens == 2
    assert memory.find(chain(2, 2, 3)) is None


def test_a_third_prompt_continues_a_second_one_where_that_continues_the_first():
    memory = PrefixMemory(10**6)
    parts = [states(count) for count in (3, 5, 7)]
    for number, copied in enumerate(parts):
        memory.put(chain(*range(3 + 2 * number)), copied, {})
    # It has less in common with the third one than that continues.
    memory.put(chain(0, 1, 9), states(3), {})
    found = memory.find(chain(*range(7))).states(1)[0]
    own = [part.states(1, start)[0] for part, start in zip(parts, (0, 3, 5), strict=True)]
    assert torch.equal(found, torch.cat(own, dim=1))
    for tokens in ((0, 1), (0, 1, 9)):
        assert torch.equal(memory.find(chain(*tokens)).states(0, 0, 2)[1], parts[0].states(0, 0, 2)[1])


def test_the_prompt_that_was_used_longest_ago_goes_first():
    each = states(4).nbytes
    memory = PrefixMemory(2 * each)
    memory.put(chain(1, 1, 1, 1), states(4), {})
    memory.put(chain(2, 2, 2, 2), states(4), {})
    memory.find(chain(1, 1))
    memory.put(chain(3, 3, 3, 3), states(4), {})
    assert memory.find(chain(2, 2)) is None
    assert memory.find(chain(1, 1)).tokens == 2
    assert memory.nbytes == 2 * each


def test_a_prompt_that_is_continued_stays_and_one_that_is_too_long_is_not_held():
    each = states(4).nbytes
    memory = PrefixMemory(each)
    memory.put(chain(1, 2, 3, 4), states(4), {})
    memory.put(chain(1, 2, 3, 4, 5), states(5), {})
    assert (len(memory), memory.nbytes) == (1, each)
    memory.put(chain(6, 7, 8, 9), states(4), {})
    assert memory.find(chain(1, 2)) is None
    assert memory.find(chain(6, 7)).tokens == 2


def test_a_chain_depends_on_tokens_positions_contents_and_salt():
    ids, positions = torch.tensor([[1, 2, 3]]), torch.arange(3)[None]
    one = chain_of(ids, positions, {1: b"a"}, "s")
    for other in (
        chain_of(torch.tensor([[1, 4, 3]]), positions, {1: b"a"}, "s"),
        chain_of(ids, torch.tensor([[0, 5, 6]]), {1: b"a"}, "s"),
        chain_of(ids, positions, {1: b"b"}, "s"),
    ):
        assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, False]
    assert not set(one) & set(chain_of(ids, positions, {1: b"a"}, "t"))
    model, inputs = models.model("qwen2_5_vl"), models.inputs("qwen2_5_vl", ONE_IMAGE)
    three = prompt_positions(model, inputs)[0]
    assert len(chain_of(inputs["input_ids"], three, {}, "")) == inputs["input_ids"].shape[1]


def test_running_answers_leave_the_rest_of_the_memory_to_prompts():
    each = states(4).nbytes
    memory = PrefixMemory(3 * each)
    for number in range(3):
        memory.put(chain(number, 1, 2, 3), states(4), {})
    memory.reserve(2 * each)
    assert (len(memory), memory.nbytes) == (1, each)
    assert memory.find(chain(2, 1)).tokens == 2
    memory.put(chain(4, 1, 2, 3, 4), states(5), {})
    assert (len(memory), memory.nbytes) == (0, 0)
    memory.reserve(0)
    memory.put(chain(4, 1, 2, 3, 4), states(5), {})
    assert memory.find(chain(4, 1)).tokens == 2


def test_prompts_of_8_bits_take_a_fraction_of_the_memory_and_are_reused():
    first = models.inputs("llava", THREE_IMAGES)
    used = {}
    for dtype in (None, "int8"):
        with engine(host_memory=2**24, host_dtype=dtype) as running:
            asked(running, "llava", first)
            own = asked(running, "llava", continued(first, TURNS[0]), "streaming-llm")
            assert own.reused_tokens == first["input_ids"].shape[1]
            used[dtype] = running.stats.host_bytes
    size = models.model("llava").config.text_config.head_dim
    assert used["int8"] == used[None] * (size + 4) // (4 * size)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llava", {"host_dtype": "int4"}, "host_dtype must be 'int8', got 'int4'"),
        ("llava", {"host_memory": -1}, "host_memory must be a whole number"),
        ("llava", {"host_memory": 10, "prefill_bound": 2.0}, "does not go with prefill_bound"),
        ("gemma3", {"host_memory": 10}, "cannot be kept in host memory"),
    ],
)
def test_what_does_not_go_with_host_memory_is_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        engine(family, **options)


def test_without_host_memory_nothing_is_held():
    inputs = models.inputs("llava", ONE_IMAGE)
    with engine() as running:
        assert running.prefixes is None
        assert [asked(running, "llava", inputs).reused_tokens for _ in range(2)] == [0, 0]
