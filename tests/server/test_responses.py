"""/v1/responses, with OpenAI's client against a server that runs."""

import time
from typing import Any

import openai
import pytest

from tests.server.conftest import MODEL, QUESTION, RunningServer, data_url

IMAGE = {"type": "input_image", "image_url": data_url(), "detail": "auto"}
ASKED = {"role": "user", "content": [IMAGE, {"type": "input_text", "text": QUESTION}]}


def test_a_question_about_an_image(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=[ASKED])
    assert response.output_text == "461"
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.output[0].content[0].type == "output_text"
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (587, 4, 591)
    cache = usage.sparsight
    assert (cache["method"], cache["budget"]) == ("sparsight", 0.1)
    assert cache["kv_bytes"] < cache["full_kv_bytes"]


def test_events_are_those_of_openai_and_add_up(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input=[ASKED], stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert len(deltas) > 1 and "".join(deltas) == "461"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert final.output_text == events[-4].text == "461"
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {final.output[0].id}
    assert events[0].response.id == final.id and events[0].response.status == "in_progress"


def test_the_helper_of_the_client_collects_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=[ASKED]) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
        assert stream.get_final_response().output_text == "461"


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=[ASKED], max_output_tokens=2)
    assert (response.output_text, response.status) == ("46", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(model=MODEL, input=[ASKED], max_output_tokens=2, stream=True)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


def test_output_and_a_new_question_continue_a_conversation(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=[ASKED])
    again = {"role": "user", "content": QUESTION}
    response = client.responses.create(model=MODEL, input=[ASKED, *first.output, again])
    chat: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_url()}},
                {"type": "text", "text": QUESTION},
            ],
        },
        {"role": "assistant", "content": "461"},
        again,
    ]
    expected = client.chat.completions.create(model=MODEL, messages=chat)
    assert response.output_text == expected.choices[0].message.content
    assert response.usage.input_tokens == expected.usage.prompt_tokens


def test_a_string_and_instructions_are_messages(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="Hello", instructions="Be brief.", max_output_tokens=4)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    assert response.output_text == expected.choices[0].message.content
    assert response.usage.input_tokens == expected.usage.prompt_tokens
    assert response.instructions == "Be brief."
    developer: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert client.responses.create(model=MODEL, input=developer).usage.input_tokens == response.usage.input_tokens


def test_sampling_and_method_are_those_of_the_request(client: openai.OpenAI) -> None:
    body = {"sparsight": {"method": "snapkv", "budget": 0.5}}
    response = client.responses.create(model=MODEL, input=[ASKED], temperature=0, top_p=0.5, extra_body=body)
    assert (response.temperature, response.top_p) == (0, 0.5)
    assert response.usage.sparsight["method"] == "snapkv"
    assert response.usage.sparsight["kept"] == pytest.approx(0.5 * 587, rel=0.02)


def test_values_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input="Hello",
        store=False,
        previous_response_id=None,
        tools=[],
        text={"format": {"type": "text"}},
        truncation="disabled",
        user="someone",
    )
    assert response.output_text is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp-1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
        ({"instructions": "a </s> b"}, "instructions"),
        ({"input": "a <image> b"}, "input"),
        ({"input": ""}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a <image>"}]}]},
            "input[0].content[0].text",
        ),
        ({"input": [ASKED] * 17}, "input"),
        ({"input": [{"role": "user", "content": [{}] * 3000}]}, "input"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**({"model": MODEL, "input": "Hello"} | fields))
    assert error.value.param == param


def test_a_client_that_leaves_frees_its_place(server: RunningServer, client: openai.OpenAI) -> None:
    stream = client.responses.create(model=MODEL, input=[ASKED], stream=True)
    next(iter(stream))
    stream.close()
    while server.service.active or server.service.engine.busy:
        time.sleep(0.01)
