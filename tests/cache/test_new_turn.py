"""A new turn of a conversation whose full prompt is kept in host memory."""

import copy

import pytest
import torch
from torch.testing import assert_close

from sparsight import RECIPES, CompressedCache, VLCache
from sparsight.models.prompt import locate
from tests.support import models
from tests.support.families import VOCABULARY
from tests.support.models import NO_IMAGE, ONE_IMAGE, ONE_VIDEO, THREE_IMAGES, generate
from tests.support.recipes import recipe_for

BATCH = {"llama": (NO_IMAGE, models.Prompt(0, 40, 3))}
SHORT, LONG = [[8, 9], [5, 6, 7, 8, 4, 3, 2]], [[3, 4, 5, 6], [7]]
METHODS = [name for name in RECIPES if name != "full"]
EXACT = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = 4


def batch(family):
    return models.inputs(family, *BATCH.get(family, (ONE_IMAGE, THREE_IMAGES)))


def kept_on_host(family, inputs, method="vl-cache", **numbers):
    model = models.model(family)
    recipe = recipe_for(model, method, **({"budget": 0.3} | numbers))
    return model, CompressedCache(model, recipe, inputs, keep="host")


def answer(model, inputs, cache, **options):
    """Greedy tokens, and the logits of the first one."""
    output = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        # Tokens that stand for images.
        suppress_tokens=list(range(90, VOCABULARY)),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.logits[0]


def followed(inputs, said, turn):
    """A conversation after an answer and a new turn, padded in front of the turn."""
    longest = max(map(len, turn))
    new = torch.tensor([[0] * (longest - len(ids)) + ids for ids in turn])
    ids = torch.cat([inputs["input_ids"], said, new], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(said), (new != 0).long()], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


def as_one_prompt(inputs, first):
    """A conversation as the processor would return it, padded on the left, with the pixels of its first turn."""
    mask = inputs["attention_mask"]
    order, longest = mask.argsort(dim=1, stable=True), int(mask.sum(-1).max())
    pixels = {name: each for name, each in first.items() if each.shape[:2] != first["input_ids"].shape}
    tokens = inputs | {
        name: torch.nn.functional.pad(each, (0, mask.shape[1] - each.shape[1]))
        for name, each in first.items()
        if name not in (*pixels, *inputs)
    }
    return {name: each.gather(1, order)[:, -longest:] for name, each in tokens.items()} | pixels


def check_as_one_prompt(model, cache, said, one_prompt):
    """The cache answers like one of the conversation as one prompt, and holds the same positions."""
    fresh = CompressedCache(model, cache.recipe, one_prompt)
    tokens, logits = answer(model, one_prompt, fresh)
    assert_close(said[1], logits, **EXACT)
    assert torch.equal(said[0], tokens)
    padding = cache.prompt.length - fresh.prompt.length
    for layer in range(len(cache.layers)):
        kept = cache.kept_positions(layer)
        assert torch.equal(torch.where(kept < 0, kept, kept - padding), fresh.kept_positions(layer))


@pytest.mark.parametrize("family", [*models.FAMILIES, "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_after_two_turns_the_cache_is_that_of_the_conversation_as_one_prompt(family, method):
    first = inputs = batch(family)
    model, cache = kept_on_host(family, inputs, method)
    said = answer(model, inputs, cache)
    for turn in (SHORT, LONG):
        inputs = followed(inputs, said[0], turn)
        said = answer(model, inputs, cache)
    check_as_one_prompt(model, cache, said, as_one_prompt(inputs, first))


@pytest.mark.parametrize("method", ["vl-cache", "streaming-llm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("family", [*models.FAMILIES, "llama"])
def test_the_first_token_of_a_later_turn_is_that_of_the_full_cache(family, dtype, tolerance, method):
    model = models.model(family, dtype=dtype)
    first = models.inputs(family, *BATCH.get(family, (ONE_IMAGE, THREE_IMAGES)), dtype=dtype)
    cache = CompressedCache(model, recipe_for(model, method, budget=0.05), first, keep="host")
    inputs = followed(first, answer(model, first, cache)[0], SHORT)
    logits = answer(model, inputs, cache)[1]
    full = models.logits(model, as_one_prompt(inputs, first), 1)[0]
    assert logits.dtype == full.dtype
    assert_close(logits, full, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["vl-cache", "h2o"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_turn_after_8_bits_attends_to_keys_and_values_rounded_by_hand(family, method):
    first = batch(family)
    model, plain = kept_on_host(family, first, method)
    rounded = CompressedCache(model, plain.recipe, first, keep="host", host_dtype="int8")
    by_hand = CompressedCache(model, plain.recipe, first, keep="host")
    said = [answer(model, first, cache) for cache in (plain, rounded, by_hand)]
    # What is held after the first turn was never rounded.
    assert all(torch.equal(said[0][1], logits) for _, logits in said)
    for copied in by_hand.host:
        for states in (states for layer in copied.layers for states in layer):
            for row in (row for head in states for row in head):
                scale = max(map(abs, row.tolist())) / 127
                row.copy_(torch.tensor([round(each / scale) * scale for each in row.tolist()]))
    inputs = followed(first, said[0][0], SHORT)
    exact, own, expected = (answer(model, inputs, cache)[1] for cache in (plain, rounded, by_hand))
    assert_close(own, expected, **EXACT)
    if method == "vl-cache":
        # Of a method that looks at all queries all tokens are computed again.
        assert not torch.equal(own, exact)
    assert (own - exact).norm() < 0.02 * exact.norm()
    assert 2 * rounded.report().host_bytes < plain.report().host_bytes


@pytest.mark.parametrize("decode", ["recall", "grow"])
def test_a_turn_without_the_host_attends_to_what_its_last_token_ranks_highest(decode):
    first = batch("llava")
    model, recipe = models.model("llava"), VLCache(budget=0.2).combined(decode=decode)
    cache = CompressedCache(model, recipe, first)
    inputs = followed(first, answer(model, first, cache)[0], SHORT)
    held = [cache.kept_positions(layer) for layer in range(3)]
    with torch.no_grad():
        seen = cache.get_seq_length()
        model(inputs["input_ids"][:, seen:], attention_mask=inputs["attention_mask"], past_key_values=cache)
    changed = [not torch.equal(before, cache.kept_positions(layer)) for layer, before in enumerate(held)]
    assert changed == [decode == "recall"] * 3
    assert [each.shape for each in held] == [cache.kept_positions(layer).shape for layer in range(3)]


def test_videos_are_found_again():
    first = models.inputs("qwen2_5_vl", ONE_VIDEO)
    model, cache = kept_on_host("qwen2_5_vl", first, "infinipot-v")
    inputs = followed(first, answer(model, first, cache)[0], SHORT[:1])
    said = answer(model, inputs, cache)
    check_as_one_prompt(model, cache, said, as_one_prompt(inputs, first))


@pytest.mark.parametrize("method", ["aircache", "vl-cache", "infinipot-v"])
def test_images_of_a_later_turn_count_as_those_of_the_prompt(method):
    first, later = (models.inputs("llava", ONE_IMAGE, seed=seed) for seed in (0, 1))
    model, cache = kept_on_host("llava", first, method)
    inputs = followed(first, answer(model, first, cache)[0], later["input_ids"].tolist())
    said = answer(model, inputs | {"pixel_values": later["pixel_values"]}, cache)
    pixels = {"pixel_values": torch.cat([each["pixel_values"] for each in (first, later)])}
    check_as_one_prompt(model, cache, said, inputs | pixels)


def test_an_image_of_a_later_turn_is_pooled_along_its_tokens_where_the_cache_does_not_get_its_pixels():
    first, later = (models.inputs("llava", ONE_IMAGE, seed=seed) for seed in (0, 1))
    model, cache = kept_on_host("llava", first, "sparsight")
    inputs = followed(first, answer(model, first, cache)[0], later["input_ids"].tolist())
    answer(model, inputs | {"pixel_values": later["pixel_values"]}, cache)
    own, line = cache.prompt.grids[0]
    assert torch.equal(own, locate(model.config, first, grids=True).grids[0][0])
    assert torch.equal(line[0], cache.prompt.vision_mask[0].nonzero()[own.numel() :, 0])


@pytest.mark.parametrize(
    ("method", "before"), [("streaming-llm", 0), ("sparsight", ONE_IMAGE.after), ("h2o", None)], ids=str
)
def test_tokens_before_the_first_query_that_the_method_looks_at_are_not_processed_again(method, before, monkeypatch):
    first = models.inputs("llava", ONE_IMAGE)
    model, cache = kept_on_host("llava", first, method)
    said = answer(model, first, cache)[0]
    processed = []
    attend = CompressedCache._attend

    def noted(self, layer, module, query, *rest, **options):
        processed.append(query.shape[2])
        return attend(self, layer, module, query, *rest, **options)

    monkeypatch.setattr(CompressedCache, "_attend", noted)
    answer(model, followed(first, said, SHORT[:1]), cache)
    before = first["input_ids"].shape[1] if before is None else before
    assert processed[0] == before + TOKENS + len(SHORT[0])


def test_a_turn_may_come_in_chunks():
    first = batch("llava")
    model, cache = kept_on_host("llava", first)
    inputs = followed(first, answer(model, first, cache)[0], SHORT)
    said = answer(model, inputs, cache, prefill_chunk_size=3)
    check_as_one_prompt(model, cache, said, as_one_prompt(inputs, first))


def test_answers_that_ended_early_are_padding_to_the_next_turn():
    first = batch("llava")
    model, cache = kept_on_host("llava", first)
    inputs = followed(first, answer(model, first, cache)[0], SHORT)
    ended = first["input_ids"].shape[1] + 2
    inputs["attention_mask"][0, ended : ended + TOKENS - 2] = 0
    said = answer(model, inputs, cache)
    check_as_one_prompt(model, cache, said, as_one_prompt(inputs, first))


def test_copies_of_a_cache_continue_on_their_own():
    first = batch("llava")
    model, cache = kept_on_host("llava", first)
    said = answer(model, first, cache)[0]
    copied = copy.deepcopy(cache)
    for own, turn in ((cache, SHORT), (copied, LONG)):
        inputs = followed(first, said, turn)
        check_as_one_prompt(model, own, answer(model, inputs, own), as_one_prompt(inputs, first))


def test_sequences_can_be_replaced_between_turns():
    first = batch("llava")
    model, cache = kept_on_host("llava", first)
    said = answer(model, first, cache)[0]
    cache.batch_select_indices(torch.tensor([1]))
    alone = models.inputs("llava", THREE_IMAGES, seed=1)
    inputs = followed(alone, said[1:], LONG[:1])
    check_as_one_prompt(model, cache, answer(model, inputs, cache), as_one_prompt(inputs, alone))


def test_tokens_that_were_taken_back_are_forgotten():
    first = models.inputs("llava", ONE_IMAGE)
    model, cache = kept_on_host("llava", first)
    said = answer(model, first, cache)[0]
    cache.crop(-2)
    inputs = followed(first, said[:, : TOKENS - 3], SHORT[:1])
    check_as_one_prompt(model, cache, answer(model, inputs, cache), as_one_prompt(inputs, first))


def test_a_cache_that_was_reset_starts_with_its_first_prompt():
    first = batch("llava")
    model, cache = kept_on_host("llava", first)
    for _ in range(2):
        inputs = followed(first, answer(model, first, cache)[0], SHORT)
        check_as_one_prompt(model, cache, answer(model, inputs, cache), as_one_prompt(inputs, first))
        cache.reset()


def test_the_report_is_about_the_conversation_so_far():
    first = models.inputs("llava", ONE_IMAGE)
    model, cache = kept_on_host("llava", first)
    inputs = followed(first, answer(model, first, cache)[0], SHORT[:1])
    before = cache.report()
    answer(model, inputs, cache)
    report = cache.report()
    assert report.prompt_tokens == [inputs["input_ids"].shape[1]]
    assert report.vision_tokens == before.vision_tokens
    assert report.host_bytes * before.prompt_tokens[0] == before.host_bytes * report.prompt_tokens[0]


def test_candidates_of_an_assistant_are_refused():
    inputs = models.inputs("llama", NO_IMAGE)
    model, cache = kept_on_host("llama", inputs)
    with pytest.raises(ValueError, match="counts as a new turn"):
        generate(model, inputs, 4, past_key_values=cache, assistant_model=models.model("llama"))


def test_a_mask_of_the_turn_alone_is_refused():
    first = models.inputs("llama", NO_IMAGE)
    model, cache = kept_on_host("llama", first)
    generate(model, first, 2, past_key_values=cache)
    turn = torch.tensor([[3, 4, 5]])
    with pytest.raises(ValueError, match=r"attention_mask of all tokens, of shape \[1, 27\]"), torch.no_grad():
        model(input_ids=turn, attention_mask=torch.ones_like(turn), past_key_values=cache)


def test_the_model_is_left_as_it_was():
    model, inputs = models.fresh_model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = CompressedCache(model, VLCache(), inputs, keep="host")
    generate(model, inputs, 2, past_key_values=cache)
    del cache
    assert not model._forward_pre_hooks
    assert not model.get_decoder()._forward_pre_hooks
