"""Chat completions, with OpenAI's client against a server that runs."""

import math

import httpx2
import openai
import pytest

from sparsight.server.settings import Settings
from tests.server.conftest import MODEL, QUESTION, asking, data_url


def ask(client, messages=None, **fields):
    messages = asking() if messages is None else messages
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def stream(client, **fields):
    return list(ask(client, stream=True, **fields))


def text_of(chunks, index=0):
    deltas = [choice.delta.content for each in chunks for choice in each.choices if choice.index == index]
    return "".join(delta or "" for delta in deltas)


def refused(client, **fields):
    """The error of a request that the server refuses."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"
    return body


def test_the_answer_and_what_the_cache_held(client):
    answer = ask(client)
    assert answer.id.startswith("chatcmpl-") and answer.model == MODEL and answer.object == "chat.completion"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "461", "stop")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (587, 4, 591)
    held = usage.model_extra["sparsight"]
    assert held["method"] == "sparsight" and held["budget"] == 0.1
    assert held["kept"] == pytest.approx(0.1 * 587, abs=0.5)
    assert held["kv_bytes"] < held["full_kv_bytes"] / 5


def test_the_stream_has_the_same_text_and_the_last_event_the_usage(client):
    chunks = stream(client, stream_options={"include_usage": True})
    assert text_of(chunks) == "461"
    assert [each.usage for each in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage == ask(client).usage
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [each.choices[0].finish_reason for each in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert len({each.id for each in chunks}) == 1


def test_a_stream_without_options_has_no_usage(client):
    assert all(each.usage is None and each.choices for each in stream(client))


def test_usage_in_every_event(client):
    chunks = stream(client, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [each.usage.completion_tokens for each in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 4


def test_events_end_with_done(server):
    body = {"model": MODEL, "messages": asking(), "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2:2]) and set(lines[1::2]) == {""}


def test_text_parts_and_strings_are_the_same(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Read the list."}]}]
    strings = [{"role": "user", "content": "Read the list."}]
    answers = [ask(client, messages, max_tokens=8) for messages in (parts, strings)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_a_conversation_goes_on(client):
    first = ask(client).choices[0].message
    again = ask(client, [*asking(), first, {"role": "user", "content": QUESTION}])
    assert again.usage.prompt_tokens > 587


def test_a_system_message(client):
    assert ask(client, [{"role": "system", "content": "Read."}, *asking()]).usage.prompt_tokens > 587


def test_several_answers(client):
    assert [each.message.content for each in ask(client, n=3).choices] == ["461"] * 3
    chunks = stream(client, n=2)
    assert [text_of(chunks, index) for index in (0, 1)] == ["461", "461"]
    ends = [each for each in chunks if each.choices[0].finish_reason]
    assert [each.choices[0].index for each in ends] == [0, 1]


def test_a_streamed_answer_ends_before_others_do(client):
    fields = {"messages": asking("Read the list."), "n": 4, "temperature": 2, "seed": 3, "max_tokens": 60}
    choices = ask(client, **fields).choices
    chunks = stream(client, **fields)
    assert [text_of(chunks, index) for index in range(4)] == [each.message.content for each in choices]
    lengths = [len(each.message.content) for each in choices]
    assert len(set(lengths)) > 1
    events = [each.choices[0] for each in chunks]
    for index in range(4):
        own = [each for each in events if each.index == index]
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choices[index].finish_reason]
    ends = [place for place, each in enumerate(events) if each.finish_reason]
    assert events[ends[0]].index == min(range(4), key=lengths.__getitem__)
    assert ends[0] < max(place for place, each in enumerate(events) if each.delta.content)


def test_the_length_of_answers(client):
    for field in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, **{field: 2})
        assert answer.choices[0].message.content == "46" and answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 2
    assert refused(client, max_tokens=2, max_completion_tokens=2)["param"] == "max_tokens"
    limit = Settings().max_new_tokens
    body = refused(client, max_completion_tokens=limit + 1)
    assert body["param"] == "max_completion_tokens" and str(limit) in body["message"]


@pytest.mark.parametrize(("stop", "text"), [("1", "46"), (["9", "61"], "4"), ("4", "")])
def test_stop_strings(client, stop, text):
    answer = ask(client, stop=stop).choices[0]
    assert (answer.message.content, answer.finish_reason) == (text, "stop")
    assert text_of(stream(client, stop=stop)) == text


def test_text_that_may_begin_a_stop_string_comes_late_but_comes(client):
    assert text_of(stream(client, stop="61 pounds")) == "461"


def test_ignore_eos(client):
    answer = ask(client, max_tokens=12, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 12 and answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content.startswith("461")


def test_sampling_by_seed(client):
    hot = {"temperature": 2.0, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
    first, same, other = (ask(client, seed=seed, **hot).choices[0].message.content for seed in (5, 5, 6))
    assert first == same != other
    assert text_of(stream(client, seed=5, **hot)) == first
    narrow = ask(client, seed=5, top_p=1e-6, **hot).choices[0].message.content
    assert narrow == ask(client, max_tokens=30, extra_body={"ignore_eos": True}).choices[0].message.content


def test_without_a_temperature_the_model_decides(client):
    """The bundled model's generation config is greedy."""
    assert len({ask(client, seed=seed, max_tokens=3).choices[0].message.content for seed in range(3)}) == 1


def test_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3).choices[0]
    assert [each.token for each in answer.logprobs.content] == ["4", "6", "1"]
    for each in answer.logprobs.content:
        assert each.bytes == list(each.token.encode())
        assert len(each.top_logprobs) == 3 and each.top_logprobs[0].token == each.token
        assert each.top_logprobs[0].logprob == each.logprob > math.log(0.5)
    chunks = stream(client, logprobs=True, top_logprobs=3)
    streamed = [token for each in chunks if each.choices[0].logprobs for token in each.choices[0].logprobs.content]
    assert streamed == answer.logprobs.content
    assert [each.top_logprobs for each in ask(client, logprobs=True).choices[0].logprobs.content] == [[]] * 3
    assert refused(client, top_logprobs=3)["param"] == "top_logprobs"


def test_logit_bias(client, server):
    four = server.service.engine.processor.tokenizer.convert_tokens_to_ids("4")
    assert not ask(client, logit_bias={str(four): -100}).choices[0].message.content.startswith("4")
    assert refused(client, logit_bias={"999999": 1})["param"] == "logit_bias"
    assert refused(client, logit_bias={"four": 1})["param"] == "logit_bias"


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties(client, penalty):
    usual = {"max_tokens": 60, "temperature": 2.0, "seed": 3, "extra_body": {"ignore_eos": True}}
    plain, same, penalised = (
        ask(client, **({penalty: value} if value is not None else {}), **usual).choices[0].message.content
        for value in (None, 0.0, 2.0)
    )
    assert plain == same
    assert plain != penalised
    assert refused(client, **{penalty: 3})["message"] == f"{penalty} must be at most 2."


def test_method_and_budget(client):
    held = ask(client, extra_body={"sparsight": {"method": "vl-cache", "budget": 0.4}}).usage.model_extra["sparsight"]
    assert (held["method"], held["budget"]) == ("vl-cache", 0.4)
    assert held["kept"] == pytest.approx(0.4 * 587, abs=1)
    half = ask(client, extra_body={"sparsight": {"budget": 0.5}}).usage.model_extra["sparsight"]
    assert (half["method"], half["budget"]) == ("sparsight", 0.5)
    full = ask(client, extra_body={"sparsight": {"method": "full"}}).usage.model_extra["sparsight"]
    assert full["kept"] == 587
    for wrong, field in (
        ({"method": "none-such"}, "sparsight.method"),
        ({"method": "full", "budget": 0.2}, "sparsight.method"),
        ({"budget": 2}, "sparsight.budget"),
        ({"recipe": "x"}, "sparsight.recipe"),
    ):
        assert refused(client, extra_body={"sparsight": wrong})["param"] == field


def test_what_changes_nothing_is_accepted(client):
    neutral = {
        "user": "someone",
        "response_format": {"type": "text"},
        "tools": [],
        "store": False,
        "service_tier": "auto",
        "metadata": None,
        "extra_body": {"parallel_tool_calls": None},
    }
    assert ask(client, **neutral).choices[0].message.content == "461"
    messages = asking()
    messages[0]["content"][0]["image_url"]["detail"] = "high"
    messages[0]["name"] = None
    assert ask(client, messages).choices[0].message.content == "461"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [TOOL]),
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("service_tier", "flex"),
        ("modalities", ["text", "audio"]),
        ("chat_template", "{{ 7 * 7 }}"),
        ("mm_processor_kwargs", {"size": 10**9}),
        ("best_of", 3),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, field, value):
    body = refused(client, extra_body={field: value})
    assert body["param"] == field and body["message"] == f"{field} is not supported."


def messages_with(part):
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"extra_body": {"messages": None}}, "messages", "messages must be a list."),
        ({"messages": []}, "messages", "messages must have at least 1 items."),
        ({"n": 0}, "n", "n must be at least 1."),
        ({"n": 10**6}, "n", "n must be at most 8."),
        ({"n": "1"}, "n", "n must be an integer."),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be at least 1."),
        ({"temperature": 2.5}, "temperature", "temperature must be at most 2."),
        ({"top_p": 0}, "top_p", "top_p must be greater than 0."),
        ({"stop": ["a"] * 5}, "stop", "stop must have at most 4 items."),
        ({"stop": ""}, "stop", "stop must not be empty."),
        ({"stop": [1]}, "stop[0]", "stop[0] must be a string."),
        ({"stop": 1}, "stop", "stop must be a string or must be a list."),
        ({"seed": 2**64}, "seed", "seed must be at most 9223372036854775807."),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream."),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", None),
        ({"messages": [{"content": ""}]}, "messages[0].role", "messages[0].role is required."),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is required."),
        ({"messages": messages_with({"type": "input_audio"})}, "messages[0].content[0].type", None),
        ({"messages": messages_with({"type": "text"})}, "messages[0].content[0].text", None),
        ({"messages": messages_with({"type": "text", "text": "a", "x": 1})}, "messages[0].content[0].x", None),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "messages[0].content", None),
        ({"messages": messages_with({"type": "text", "text": "</s>"})}, "messages[0].content[0].text", None),
        ({"messages": [{"role": "system", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", None),
    ],
)
def test_wrong_values_are_named(client, fields, param, message):
    body = refused(client, **fields)
    assert body["param"] == param
    assert body["message"].startswith(param)
    if message is not None:
        assert body["message"] == message


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=asking())
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_too_much(client):
    settings = Settings()
    texts = [{"role": "user", "content": "a"}] * (settings.max_messages + 1)
    assert refused(client, messages=texts)["message"] == "messages must have at most 256 items."
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    images = [{"role": "user", "content": [image] * (settings.max_images + 1)}]
    assert refused(client, messages=images)["message"] == "messages must have at most 16 images."
    long = [{"role": "user", "content": "x" * (settings.max_text + 1)}]
    assert "1,048,576 characters" in refused(client, messages=long)["message"]
    assert refused(client, messages=[{"role": "user", "content": "x " * 4096}])["code"] == "context_length_exceeded"


def test_models(client):
    assert [each.id for each in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "sparsight"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_no_path(client, server):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="text")
    response = httpx2.get(f"{server.url}/v1/chat/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["message"] == "The path has no such method."
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx2.get(f"{server.url}/ready").status_code == 200
