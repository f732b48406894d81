"""What can be asked of the engine, and what comes back."""

import pytest
import torch
from PIL import Image

import sparsight
from sparsight import Engine, RequestError
from tests.engine.requests import (
    Ask,
    add,
    engine,
    generated,
    inputs_of,
    recipe_of,
)
from tests.support.models import fresh_model


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
