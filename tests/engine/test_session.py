"""A conversation with an engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsight
from sparsight import Engine, RequestError, SamplingParams

IMAGE = Path(__file__).parents[2] / "examples" / "receipt-1.png"


@pytest.fixture
def reading() -> Iterator[Engine]:
    model, processor = sparsight.load()
    with Engine(model, processor, "sparsight", host_memory=2**28) as engine:
        yield engine


def test_later_questions_are_answered_from_the_full_prompt(reading: Engine) -> None:
    session = reading.session([IMAGE])
    first, second = session.ask("How much is JU?"), session.ask("How much is CY?")
    assert (first.text, second.text) == ("461", "883")
    assert first.reused_tokens == 0
    # What comes before the image, and the image: the method looks at the text after it.
    assert second.reused_tokens == sum(first.report.vision_tokens) + 2
    assert session.report() is second.report
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]


def test_another_session_on_the_same_image_does_not_compute_it_again(reading: Engine) -> None:
    reading.session([IMAGE]).ask("How much is JU?")
    again = reading.session([IMAGE]).ask("How much is CY?")
    assert (again.text, again.reused_tokens) == ("883", 578)
    other = reading.session([IMAGE], salt="another key").ask("How much is CY?")
    assert (other.text, other.reused_tokens) == ("883", 0)


def test_images_may_come_with_any_question(reading: Engine) -> None:
    session = reading.session([IMAGE], params=SamplingParams(max_new_tokens=8))
    session.ask("How much is JU?")
    completion = session.ask("What does GE say?", [IMAGE.with_name("receipt-2.png")])
    assert completion.text == "054"
    assert sum(completion.report.vision_tokens) == 2 * 576
    assert completion.reused_tokens >= 578


def test_a_question_that_fails_is_no_part_of_the_conversation(reading: Engine) -> None:
    session = reading.session([IMAGE])
    with pytest.raises(ValueError, match="has no answer yet"):
        session.report()
    reading.kv_bytes = 1
    with pytest.raises(RequestError, match="KV memory"):
        session.ask("How much is JU?")
    assert session.messages == []
    reading.kv_bytes = 2**28
    assert session.ask("How much is JU?").text == "461"


def test_an_image_that_cannot_be_read_is_refused_at_once(reading: Engine) -> None:
    with pytest.raises(ValueError, match=r"Cannot read .*missing\.png"):
        reading.session([IMAGE.with_name("missing.png")])
