"""What can be asked of the engine, and what comes back."""

import pytest
import torch
from PIL import Image

import sparsight
from sparsight import RECIPES, CompressedCache, Engine, RequestError, SamplingParams
from sparsight.engine.positions import next_positions
from sparsight.engine.prefilled import next_logits, split
from tests.engine.requests import (
    PROMPTS,
    Ask,
    add,
    alone,
    check_empty,
    engine,
    generated,
    inputs_of,
    recipe_of,
)
from tests.support.models import fresh_model, generate, inputs, model


def test_pieces_are_the_answer():
    ask = Ask(tokens=9)
    with engine() as running:
        handle = add(running, "llava", ask, n=2, temperature=1.0, seed=1, logprobs=2)
        pieces = list(handle)
        answers = handle.wait()
    for index, answer in enumerate(answers):
        own = [piece for piece in pieces if piece.answer == index]
        assert "".join(piece.text for piece in own) == answer.text
        assert tuple(piece.token for piece in own if piece.token) == answer.tokens
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in answer.tokens)
        assert answer.report.prompt_tokens == [inputs_of("llava", ask)["input_ids"].shape[1]]


def test_defaults_are_the_models_own():
    built = fresh_model("llava")
    tokens = generated("llava", Ask(tokens=10))
    built.generation_config.eos_token_id = tokens[3]
    with Engine(built, engine().processor, recipe_of("llava", Ask())) as running:
        (answer,) = running.add(inputs=inputs_of("llava", Ask())).wait()
    assert answer.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert answer.finish_reason == "stop"


def test_what_began_in_inference_mode_goes_on_outside_of_it():
    with torch.inference_mode():
        running = engine()
        handles = [add(running, "llava", Ask(method=method)) for method in ("h2o", "vl-cache")]
        for _ in range(3):
            running.step()
    running.run()
    assert [handle.wait()[0].token_ids for handle in handles] == [
        generated("llava", Ask(method=method)) for method in ("h2o", "vl-cache")
    ]


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_without_a_pool_the_report_is_about_the_end_of_the_answer(family):
    asks = [Ask(0, "vl-cache"), Ask(1, "elastic", 0.5, 9)]
    with engine(family, kv_memory=None) as running:
        handles = [add(running, family, ask) for ask in asks]
        (several,) = {tuple(each.token_ids) for each in add(running, family, Ask(2), n=2).wait()}
        assert list(several) == generated(family, Ask(2))
        for ask, handle in zip(asks, handles, strict=True):
            (answer,) = handle.wait()
            assert answer.token_ids == generated(family, ask)
            given, built = inputs_of(family, ask), model(family)
            cache = CompressedCache(built, recipe_of(family, ask), given)
            generate(built, given, ask.tokens, past_key_values=cache)
            assert answer.report == cache.report()
        check_empty(running)


def test_without_a_processor_there_are_tokens_and_no_text():
    with Engine(model("llava"), None) as running:
        (answer,) = add(running, "llava", Ask()).wait()
        assert (answer.token_ids, answer.text) == (generated("llava", Ask()), "")
        with pytest.raises(RequestError, match="Stop strings need text"):
            add(running, "llava", Ask(), stop="a").wait()


def test_a_single_token_takes_no_time_of_decoding():
    with engine() as running:
        (answer,) = add(running, "llava", Ask(tokens=1)).wait()
    assert answer.prefill_seconds > 0
    assert answer.decode_seconds == 0


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", RECIPES)
def test_answers_to_a_processed_batch_are_those_of_its_prompts_alone(family, method):
    asks = [Ask(prompt, method) for prompt in (0, 2)]
    given = inputs(family, *(PROMPTS[ask.prompt] for ask in asks))
    # The second prompt is drawn from another seed than alone.
    built, single = model(family), inputs(family, PROMPTS[2], seed=1)
    cache = CompressedCache(built, recipe_of(family, asks[0]), given)
    logits = next_logits(built, cache, given)
    params = SamplingParams(max_new_tokens=6)
    with engine(family) as running:
        other = add(running, family, Ask(1))
        running.step()
        prompts = split(cache, given, next_positions(built, given), logits)
        handles = [running.resume(prompt, params) for prompt in prompts]
        (expected,) = running.add(inputs=single, recipe=recipe_of(family, asks[1]), params=params).wait()
        assert handles[0].wait()[0].token_ids == generated(family, asks[0])
        assert handles[1].wait()[0].token_ids == expected.token_ids
        assert other.wait()[0].token_ids == generated(family, Ask(1))
        check_empty(running)


def test_positions_of_the_entries_kept_are_handed_over_if_requested():
    recipe, given = recipe_of("llava", Ask()), inputs_of("llava", Ask())
    cache = CompressedCache(model("llava"), recipe, given)
    with torch.no_grad():
        model("llava")(**given, past_key_values=cache)
    with engine() as running:
        first, second = (running.add(inputs=given, recipe=recipe, keep_positions=keep) for keep in (True, False))
        running.run()
    assert second.kept_positions == {}
    assert list(first.kept_positions) == cache.report().layers
    for layer, positions in first.kept_positions.items():
        assert positions.tolist() == cache.kept_positions(layer)[0].tolist()


def test_pieces_can_be_taken_without_work():
    with engine() as running:
        handle = add(running, "llava", Ask())
        assert handle.take() == [] and running.busy
        running.run()
        taken = [piece.token.token_id for piece in handle.take() if piece.token]
    assert taken == handle.completions[0].token_ids == alone("llava", Ask())[0][0]
    assert handle.take() == []


# Messages and images


@pytest.fixture(scope="module")
def reader():
    return sparsight.load()


@pytest.fixture(scope="module")
def page():
    return Image.open("examples/receipt-1.png")


def test_questions_conversations_and_inputs_are_the_same(reader, page):
    text = "How much is JU?"
    messages = [{"role": "user", "content": [{"type": "image", "image": page}, {"type": "text", "text": text}]}]
    inputs = reader[1].apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with Engine(*reader, "sparsight") as running:
        handles = [
            running.add(text, [page]),
            running.add(text, ["examples/receipt-1.png"]),
            running.add(messages=messages),
            running.add(inputs=inputs),
        ]
        assert [handle.wait()[0].text for handle in handles] == ["461"] * 4


def test_an_image_that_breaks_the_processor_ends_its_request_alone(reader, page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    with Engine(*reader, "sparsight") as running:
        good = running.add("How much is JU?", [page])
        bad = [
            running.add("How much is JU?", [broken]),
            running.add("How much is JU?", [tmp_path / "missing.png"]),
            running.add("How much is JU?", [Image.new("RGB", (1, 4000))]),
            running.add("How much is </s>?", [page]),
            running.add(messages=[{"role": "user", "content": [{"type": "image", "image": object()}]}]),
        ]
        for handle in bad:
            with pytest.raises(RequestError) as error:
                handle.wait()
            assert str(error.value).endswith(".")
            assert "\n" not in str(error.value)
        assert good.wait()[0].text == "461"
