"""CompressedCache in plain transformers generation."""

import copy
import gc
import importlib.machinery
import itertools
import sys
import threading
import types

import pytest
import torch
from accelerate import dispatch_model
from torch.testing import assert_close
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TextStreamer,
    modeling_flash_attention_utils,
)

from sparsight import CompressedCache, ElasticCache, VLCache
from sparsight import recipe as recipe_of
from sparsight.cache.dense_store import growth_step
from tests.support import families, models
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES, generate

BATCH = (ONE_IMAGE, THREE_IMAGES, NO_TEXT_AFTER)
RECIPES = [VLCache(budget=0.1), ElasticCache(budget=0.1)]
HEAD_WISE = recipe_of("adakv", budget=0.3, window=4)
by_name = pytest.mark.parametrize(
    "recipe",
    [*RECIPES, recipe_of("h2o", budget=0.2), HEAD_WISE, HEAD_WISE.combined(decode="heavy-hitter")],
    ids=lambda recipe: recipe.name,
)


def compressed(model, inputs, recipe=RECIPES[0]):
    return CompressedCache(model, recipe, inputs)


@pytest.mark.parametrize("prompts", [(ONE_IMAGE,), BATCH], ids=["alone", "padded batch"])
@pytest.mark.parametrize("family", [*models.FAMILIES, "llama"])
@pytest.mark.parametrize("recipe", [VLCache(budget=1.0), ElasticCache(budget=1.0)], ids=lambda recipe: recipe.name)
def test_budget_one_equals_full_cache(family, prompts, recipe):
    model = models.model(family)
    inputs = models.inputs(
        family, *(prompts if family != "llama" else [NO_IMAGE, models.Prompt(0, 40, 3)][: len(prompts)])
    )
    cache = compressed(model, inputs, recipe)
    assert torch.equal(generate(model, inputs, 64, past_key_values=cache), generate(model, inputs, 64))


@by_name
@pytest.mark.parametrize("family", models.FAMILIES)
def test_each_sequence_of_a_padded_batch_answers_as_it_does_alone(family, recipe):
    model = models.model(family)
    together = models.inputs(family, *BATCH)
    answers = generate(model, together, 32, past_key_values=compressed(model, together, recipe))
    for row, prompt in enumerate(BATCH):
        alone = models.inputs(family, prompt, seed=row)
        cache = compressed(model, alone, recipe)
        answer = generate(model, alone, 32, past_key_values=cache)
        assert answer[0].tolist() == answers[row].tolist()
        assert cache.report().prompt_tokens == [alone["input_ids"].shape[1]]


def test_the_first_token_is_that_of_the_full_cache():
    model, inputs = models.model("llava"), models.inputs("llava", *BATCH)
    answer = generate(model, inputs, 1, past_key_values=compressed(model, inputs))
    assert torch.equal(answer, generate(model, inputs, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", [VLCache(budget=1.0), ElasticCache(budget=1.0)], ids=lambda recipe: recipe.name)
def test_beams_and_samples_at_budget_one_equal_the_full_cache(options, recipe):
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES)
    torch.manual_seed(0)
    expected = generate(model, inputs, 20, **options)
    torch.manual_seed(0)
    cache = compressed(model, inputs, recipe)
    assert torch.equal(generate(model, inputs, 20, past_key_values=cache, **options), expected)


@by_name
def test_one_beam_of_several_equals_greedy_when_its_rows_are_selected(recipe):
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES)
    cache = compressed(model, inputs, recipe)
    generate(model, inputs, 6, past_key_values=cache, num_beams=3)
    assert len(cache.report().prompt_tokens) == 6
    assert cache.kept_positions(0).shape[0] == 6


@by_name
def test_rows_can_be_repeated_and_selected_between_steps(recipe):
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE, THREE_IMAGES)
    cache = compressed(model, inputs, recipe)
    generate(model, inputs, 30, past_key_values=cache)
    before = [cache.kept_positions(layer) for layer in range(3)]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    for layer in range(3):
        # Row 3 of the repeated batch is the second prompt.
        assert torch.equal(cache.kept_positions(layer), before[layer][[1, 0]])
    assert cache.report().prompt_tokens == [span.length for span in (cache.prompt.spans[0], cache.prompt.spans[1])]
    step = {"input_ids": torch.tensor([[5], [5]]), "attention_mask": torch.ones(2, cache.get_seq_length() + 1)}
    assert torch.no_grad()(model)(**step, past_key_values=cache).logits.isfinite().all()


def test_assisted_generation_equals_greedy_generation_of_the_compressed_cache_at_budget_one():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = compressed(model, inputs, VLCache(budget=1.0))
    answer = generate(model, inputs, 30, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(answer, generate(model, inputs, 30))


def test_assisted_generation_is_refused_where_entries_are_overwritten():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    with pytest.raises(ValueError, match="'fixed-point' overwrites entries"):
        generate(model, inputs, 5, past_key_values=compressed(model, inputs, RECIPES[1]), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("recipe", [VLCache(budget=0.1), HEAD_WISE], ids=lambda recipe: recipe.name)
def test_crop_takes_back_tokens_added_since_compression(recipe):
    model, inputs = models.model("llava"), models.inputs("llava", *BATCH)
    cache = compressed(model, inputs, recipe)
    logits = models.logits(model, inputs, 6, past_key_values=cache)
    held, seen = cache.report().held, cache.get_seq_length()
    cache.crop(-3)
    assert cache.get_seq_length() == seen - 3
    assert cache.report().held[0][0][0] == held[0][0][0] - 3
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    step = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
    token = logits[2].argmax(-1)[:, None]
    again = torch.no_grad()(model)(input_ids=token, **step, past_key_values=cache).logits[:, -1]
    assert_close(again, logits[3], rtol=1e-4, atol=1e-4)


def test_crop_of_the_compressed_prompt_is_refused():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = compressed(model, inputs)
    generate(model, inputs, 4, past_key_values=cache)
    with pytest.raises(ValueError, match=r"Cannot crop 4 tokens: only 3 were added"):
        cache.crop(-4)
    elastic = compressed(model, inputs, RECIPES[1])
    generate(model, inputs, 4, past_key_values=elastic)
    with pytest.raises(ValueError, match="'fixed-point' overwrites"):
        elastic.crop(-1)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_conversation_at_budget_one_equals_the_full_cache(family):
    model, inputs = models.model(family), models.inputs(family, ONE_IMAGE)
    turns = []
    for cache in (compressed(model, inputs, VLCache(budget=1.0)), None):
        options = {"past_key_values": cache, "return_dict_in_generate": True, "do_sample": False}
        first = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, **options)
        turn = torch.tensor([[7, 8, 9, 10]])
        ids = torch.cat([first.sequences, turn], dim=1)
        options["past_key_values"] = first.past_key_values
        second = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20, **options
        )
        turns.append(second.sequences)
    assert torch.equal(*turns)


@by_name
def test_a_new_turn_is_added_as_it_is(recipe):
    model, inputs = models.model("llava"), models.inputs("llava", *BATCH)
    cache = compressed(model, inputs, recipe)
    answer = generate(model, inputs, 5, past_key_values=cache)
    held = cache.report().held
    # One sequence's turn is shorter: padded on the left, and padding is never attended to.
    turn = torch.tensor([[0, 0, 8, 9], [5, 6, 7, 8], [0, 4, 5, 6]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer), (turn != 0).long()], dim=1)
    ids = torch.cat([inputs["input_ids"], answer, turn], dim=1)
    model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, min_new_tokens=1, do_sample=False
    )
    added = [new[0] - old[0] for new, old in zip(cache.report().held[0], held[0], strict=True)]
    # The last answer token of the first turn comes with the new turn.
    assert added == [3, 5, 4]
    positions = cache.layers[0].store.positions.view(3, 2, -1)
    newest = cache.get_seq_length() - 5
    assert [sorted(p for p in row[0].tolist() if p > newest) for row in positions] == [
        [newest + 3, newest + 4],
        [newest + 1, newest + 2, newest + 3, newest + 4],
        [newest + 2, newest + 3, newest + 4],
    ]


@by_name
def test_a_padded_turn_answers_as_each_conversation_does_alone(recipe):
    model = models.model("llava")
    together = models.inputs("llava", *BATCH)
    turns = [[8, 9], [5, 6, 7, 8], [4, 5, 6]]

    def second_answers(inputs, turns):
        cache = compressed(model, inputs, recipe)
        answer = generate(model, inputs, 5, past_key_values=cache)
        longest = max(map(len, turns))
        turn = torch.tensor([[0] * (longest - len(row)) + row for row in turns])
        ids = torch.cat([inputs["input_ids"], answer, turn], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer), (turn != 0).long()], dim=1)
        return generate(model, {"input_ids": ids, "attention_mask": mask}, 12, past_key_values=cache)

    answers = second_answers(together, turns)
    for row, prompt in enumerate(BATCH):
        alone = models.inputs("llava", prompt, seed=row)
        assert second_answers(alone, turns[row : row + 1])[0].tolist() == answers[row].tolist()


def test_streamers_and_dict_outputs(capsys):
    class Decoder:
        def decode(self, ids, **_):
            return " ".join(map(str, ids)) + "\n"

    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    streamer = TextStreamer(Decoder(), skip_prompt=True)
    cache = compressed(model, inputs)
    output = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=8, streamer=streamer, return_dict_in_generate=True
    )
    assert output.past_key_values is cache
    assert capsys.readouterr().out.split() == [str(token) for token in output.sequences[0, -8:].tolist()]


def test_chunked_prefill_observes_what_one_prefill_does():
    model, inputs = models.model("llama"), models.inputs("llama", models.Prompt(0, 50, 0), models.Prompt(0, 20, 0))
    for recipe in [*RECIPES, HEAD_WISE, recipe_of("aircache", budget=0.2)]:
        whole, chunked = compressed(model, inputs, recipe), compressed(model, inputs, recipe)
        answer = generate(model, inputs, 10, past_key_values=whole)
        assert torch.equal(generate(model, inputs, 10, past_key_values=chunked, prefill_chunk_size=17), answer)
        for layer in range(3):
            assert torch.equal(whole.kept_positions(layer), chunked.kept_positions(layer))


def test_eager_attention_does_the_prefill_of_a_model_that_was_loaded_with_it():
    model, inputs = models.fresh_model("llava"), models.inputs("llava", *BATCH)
    model.set_attn_implementation("eager")
    cache = compressed(model, inputs, VLCache(budget=1.0))
    assert_close(
        torch.stack(models.logits(model, inputs, 12, past_key_values=cache)),
        torch.stack(models.logits(model, inputs, 12)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("recipe", [VLCache(budget=1.0), ElasticCache(budget=1.0)], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_flash_attention_does_the_prefill_of_a_model_that_was_loaded_with_it(family, recipe, flash_attention):
    model, inputs = models.fresh_model(family), models.inputs(family, *BATCH)
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    expected = generate(model, inputs, 12)
    flash_attention.clear()
    cache = compressed(model, inputs, recipe)
    assert torch.equal(generate(model, inputs, 12, past_key_values=cache), expected)
    # The kernel runs once a layer, for the prompt; a padded turn is told of its padding by a mask of two dimensions.
    assert len(flash_attention) == 3
    more = {"input_ids": torch.cat([inputs["input_ids"], expected, torch.tensor([[0, 8], [5, 6], [0, 7]])], dim=1)}
    mask = [inputs["attention_mask"], torch.ones_like(expected), torch.tensor([[0, 1], [1, 1], [0, 1]])]
    more["attention_mask"] = torch.cat(mask, dim=1)
    full = DynamicCache(config=model.get_decoder().config)
    generate(model, inputs, 12, past_key_values=full)
    assert torch.equal(generate(model, more, 8, past_key_values=cache), generate(model, more, 8, past_key_values=full))


@pytest.fixture(scope="module")
def flash_attention():
    """A stand-in for the flash-attn package, which needs a GPU: its functions over sdpa, and a log of their calls."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **_):
        calls.append(q.shape)
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        lengths = q.shape[2], k.shape[2]
        mask = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0]) if causal else None
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        logged = len(calls)
        bounds = zip(itertools.pairwise(cu_seqlens_q), itertools.pairwise(cu_seqlens_k), strict=True)
        rows = [flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0] for (a, b), (c, d) in bounds]
        del calls[logged + 1 :]
        return torch.cat(rows)

    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input = modeling_flash_attention_utils._pad_input
    padding.unpad_input = modeling_flash_attention_utils._unpad_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        patch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
        yield calls


def test_layers_spread_by_accelerate():
    model = models.fresh_model("llava")
    inputs = models.inputs("llava", *BATCH)
    expected = generate(model, inputs, 10, past_key_values=compressed(model, inputs))
    layers = {f"model.language_model.layers.{index}": "cpu" for index in range(3)}
    others = dict.fromkeys(
        ["model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens",
         "model.language_model.norm", "model.language_model.rotary_emb", "lm_head"], "cpu"
    )  # fmt: skip
    model = dispatch_model(model, {**others, **layers}, force_hooks=True)
    assert torch.equal(generate(model, inputs, 10, past_key_values=compressed(model, inputs)), expected)


def test_a_model_is_as_before_when_its_caches_are_gone():
    model, inputs = models.fresh_model("llava"), models.inputs("llava", ONE_IMAGE)
    config = model.config.text_config
    expected = generate(model, inputs, 8)
    first, second = compressed(model, inputs), compressed(model, inputs)
    assert config._attn_implementation == "sparsight_sdpa"
    # Other caches run on the model's own attention meanwhile.
    assert torch.equal(generate(model, inputs, 8), expected)
    del first
    gc.collect()
    assert config._attn_implementation == "sparsight_sdpa"
    generate(model, inputs, 2, past_key_values=second)
    del second
    gc.collect()
    assert config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, inputs, 8), expected)


def test_attention_that_is_chosen_meanwhile_stays_chosen():
    model, inputs = models.fresh_model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = compressed(model, inputs)
    model.set_attn_implementation("eager")
    del cache
    gc.collect()
    assert model.config.text_config._attn_implementation == "eager"
    first = compressed(model, inputs)
    model.set_attn_implementation("sdpa")
    second = compressed(model, inputs)
    assert generate(model, inputs, 3, past_key_values=second).shape == (1, 3)
    del first, second
    gc.collect()
    assert model.config.text_config._attn_implementation == "sdpa"


def test_two_models_and_two_caches_in_two_threads_do_not_disturb_each_other():
    jobs = [("llava", RECIPES[0]), ("llava", RECIPES[1]), ("qwen2_5_vl", RECIPES[0]), ("qwen2_5_vl", RECIPES[1])]

    def answer(family, recipe):
        inputs = models.inputs(family, ONE_IMAGE)
        model = models.model(family)
        return generate(model, inputs, 24, past_key_values=compressed(model, inputs, recipe)).tolist()

    # Qwen2.5-VL keeps its rope deltas on the model, so one thread a model runs it; Llava is shared by two threads.
    expected = [answer(*job) for job in jobs]
    answers = [None] * len(jobs)

    def work(indices):
        for index in indices:
            answers[index] = answer(*jobs[index])

    threads = [threading.Thread(target=work, args=[indices]) for indices in ([0], [1], [2, 3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected


def test_a_cache_that_was_filled_in_inference_mode_goes_on_outside_of_it():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    for recipe in (*RECIPES, recipe_of("h2o"), HEAD_WISE):
        cache = compressed(model, inputs, recipe)
        with torch.inference_mode():
            answer = generate(model, inputs, 4, past_key_values=cache, num_beams=2)
        ids = torch.cat([inputs["input_ids"], answer, torch.tensor([[9, 9]])], dim=1)
        cache.batch_select_indices([0])
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 70, past_key_values=cache)


def test_fused_projections_are_not_held():
    config = Phi3Config(**families.text_config("1:2"))
    model = Phi3ForCausalLM(config).eval()
    inputs = models.inputs("llama", NO_IMAGE)
    cache = compressed(model, inputs)
    update = cache._compact
    held = []
    cache._compact = lambda: held.append([layer.prefill.values for layer in cache.layers]) or update()
    generate(model, inputs, 1, past_key_values=cache)
    for values in held[0]:
        assert values.untyped_storage().nbytes() == values.nbytes


def test_a_copied_cache_goes_its_own_way():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = compressed(model, inputs)
    answer = generate(model, inputs, 4, past_key_values=cache)
    branch = copy.deepcopy(cache)
    ids = torch.cat([inputs["input_ids"], answer, torch.tensor([[9, 9]])], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = cache.get_seq_length()
    again = generate(model, more, 5, past_key_values=branch)
    assert cache.get_seq_length() == length
    assert torch.equal(generate(model, more, 5, past_key_values=cache), again)


def test_reset_waits_for_the_prompt_again():
    model, inputs = models.model("llava"), models.inputs("llava", ONE_IMAGE)
    cache = compressed(model, inputs)
    answer = generate(model, inputs, 8, past_key_values=cache, num_beams=2)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.report().sparsity is None
    assert torch.equal(generate(model, inputs, 8, past_key_values=cache, num_beams=2), answer)


def test_bytes_held_are_those_of_the_kept_entries_and_one_growth_step():
    model = models.model("llama")
    inputs = models.inputs("llama", models.Prompt(0, 2000, 0))
    full = families.text_config("1:2")
    cache = compressed(model, inputs)
    generate(model, inputs, 1, past_key_values=cache)
    report = cache.report()
    head_size = full["hidden_size"] // full["num_attention_heads"]
    entry = 2 * head_size * 4
    assert report.full_bytes == 2000 * entry * 2 * 3
    kept = sum(kept[0] for layer in report.kept for kept in layer)
    assert abs(kept - 600) <= 3
    room = sum(growth_step(layer[0][0]) for layer in report.kept)
    assert report.bytes_held == (kept + room) * 2 * (entry + 4)
    assert all(layer.prefill is None for layer in cache.layers)


@pytest.mark.parametrize("prompts", [[2000], [2000, 1300, 600]], ids=["alone", "padded batch"])
def test_head_wise_budgets_free_the_memory_of_heads_that_keep_less(prompts):
    model = models.model("llama")
    inputs = models.inputs("llama", *[models.Prompt(0, length, 0) for length in prompts])
    cache = compressed(model, inputs, recipe_of("adakv", budget=0.1))
    generate(model, inputs, 1, past_key_values=cache)
    report = cache.report()
    assert any(len(set(heads)) > 1 for layer in report.kept for heads in layer)
    entry = 2 * 16 * 4
    step = sum(len(prompts) * 2 * growth_step(sum(prompts) // len(prompts) // 10) * (entry + 4) for _ in report.kept)
    assert report.bytes_held <= 0.105 * sum(prompts) * entry * 2 * 3 + step


@pytest.mark.parametrize(
    ("allocate", "rule"),
    [("uniform", "fixed-point"), ("uniform", "sliding"), ("uniform", "heavy-hitter"), ("across-heads", "sliding")],
)
def test_rules_that_drop_stay_within_the_allowance_for_long_answers(rule, allocate):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**models.text_config("1:2", layers=1))).eval()
    inputs = models.inputs("llama", models.Prompt(0, 60, 0))
    cache = compressed(model, inputs, VLCache(budget=0.05).combined(allocate=allocate, decode=rule))
    generate(model, inputs, 4001, past_key_values=cache)
    report = cache.report()
    assert cache.get_seq_length() == 4060
    # Two KV heads, each with its share of all tokens seen.
    assert sum(report.held[0][0]) <= 2 * 0.05 * 4060
    assert report.bytes_held <= (2 * 0.05 * 4060 + 2 * growth_step(203)) * (2 * 16 * 4 + 4)


def test_kept_positions_are_those_of_the_prompt_and_padded_with_minus_one():
    model, inputs = models.model("llava"), models.inputs("llava", *BATCH)
    cache = compressed(model, inputs, VLCache(budget=0.3))
    with pytest.raises(ValueError, match="Nothing is compressed yet"):
        cache.kept_positions(0)
    generate(model, inputs, 5, past_key_values=cache)
    report = cache.report()
    for layer in range(3):
        positions = cache.kept_positions(layer)
        assert positions.dtype == torch.int64
        for b, row in enumerate(positions):
            for h, head in enumerate(row):
                kept = report.kept[layer][b][h]
                assert (head[:kept].diff() > 0).all()
                assert (head[kept:] == -1).all()
                assert inputs["attention_mask"][b, head[:kept]].all()
                assert head[kept - 1] == inputs["input_ids"].shape[1] - 1


def test_sliding_layers_stay_as_they_are():
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(**families.text_config("1:2"), use_sliding_window=True, sliding_window=16, layer_types=layers)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    inputs = models.inputs("llama", models.Prompt(0, 40, 0))
    cache = compressed(model, inputs, VLCache(budget=1.0))
    answer = generate(model, inputs, 20, past_key_values=cache)
    assert [type(layer).__name__ for layer in cache.layers][::2] == ["DynamicSlidingWindowLayer"] * 2
    assert torch.equal(answer, generate(model, inputs, 20))
    with pytest.raises(ValueError, match="Layer 0 is not compressed"):
        cache.kept_positions(0)
