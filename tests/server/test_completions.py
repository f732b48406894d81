"""Text completions, with OpenAI's client against a server that runs."""

import math

import openai
import pytest

from tests.server.conftest import MODEL

PROMPT = "Read the list. "


def complete(client, prompt=PROMPT, **fields):
    return client.completions.create(model=MODEL, prompt=prompt, **fields)


def test_text_and_its_tokens_have_the_same_completion(client, server):
    answer = complete(client)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert answer.usage.completion_tokens <= 16 and answer.usage.model_extra["sparsight"]["method"] == "sparsight"
    ids = server.service.engine.processor.tokenizer(PROMPT)["input_ids"]
    assert answer.usage.prompt_tokens == len(ids)
    texts = [complete(client, prompt).choices[0].text for prompt in ([PROMPT], ids)]
    assert texts == [answer.choices[0].text] * 2


def test_stream(client, server):
    fields = {"max_tokens": 5, "extra_body": {"ignore_eos": True}, "n": 2}
    # The client's type of an event lacks the null that OpenAI sends as the reason before the end.
    lenient = server.client(_strict_response_validation=False)
    chunks = list(complete(lenient, stream=True, stream_options={"include_usage": True}, **fields))
    answer = complete(client, **fields)
    for index in (0, 1):
        texts = [each.text for chunk in chunks for each in chunk.choices if each.index == index]
        assert "".join(texts) == answer.choices[index].text
    assert [each.choices[0].finish_reason for each in chunks[-3:-1]] == ["length"] * 2
    assert chunks[-1].usage.completion_tokens == 10 == answer.usage.completion_tokens


def test_logprobs(client, server):
    fields = {"max_tokens": 8, "n": 2, "temperature": 1, "seed": 1}
    choices = complete(client, logprobs=3, **fields).choices
    assert choices[0].text != choices[1].text
    for choice in choices:
        logprobs = choice.logprobs
        assert "".join(logprobs.tokens) == choice.text
        ends = [*logprobs.text_offset[1:], len(choice.text)]
        offsets = zip(logprobs.text_offset, ends, strict=True)
        assert [choice.text[start:end] for start, end in offsets] == logprobs.tokens
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert top[token] == logprob <= 0 and 3 <= len(top) <= 4
            assert list(top.values())[:3] == sorted(top.values(), reverse=True)[:3]
            assert sum(map(math.exp, top.values())) <= 1.001
    lenient = server.client(_strict_response_validation=False)
    chunks = list(complete(lenient, logprobs=3, stream=True, **fields))
    for choice in choices:
        streamed = [each.choices[0].logprobs for each in chunks if each.choices[0].index == choice.index]
        for name, expected in choice.logprobs.model_dump().items():
            assert [value for each in streamed if each for value in getattr(each, name)] == expected
    bare = complete(client, logprobs=0, **fields).choices[0].logprobs
    assert bare.top_logprobs == [
        {each: logprob} for each, logprob in zip(bare.tokens, bare.token_logprobs, strict=True)
    ]
    assert complete(client).choices[0].logprobs is None


@pytest.mark.parametrize(
    ("prompt", "fields", "param", "message"),
    [
        ("", {}, "prompt", "prompt must not be empty."),
        ([], {}, "prompt", "prompt must have at least 1 items."),
        (["a", "b"], {}, "prompt", "prompt must be one text, or the tokens of one."),
        ([[1, 2]], {}, "prompt[0]", None),
        ([-1], {}, "prompt[0]", None),
        ([10**6], {}, "prompt", None),
        ([4], {}, "prompt", None),
        ("<image>", {}, "prompt", None),
        ("a", {"echo": True}, "echo", "echo is not supported."),
        ("a", {"logprobs": 6}, "logprobs", "logprobs must be at most 5."),
        ("a", {"logprobs": True}, "logprobs", "logprobs must be an integer."),
        ("a", {"best_of": 2}, "best_of", "best_of is not supported."),
        ("a", {"max_tokens": 10**6}, "max_tokens", "max_tokens must be at most 1024."),
    ],
)
def test_what_is_refused(client, prompt, fields, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt, **fields)
    assert caught.value.param == param
    assert caught.value.body["message"] == message or message is None


def test_a_long_prompt(client):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, "x " * 4096)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
