"""Chat completions, with OpenAI's client against a server that runs."""

from tests.server.conftest import MODEL, asking


def test_answer(client):
    response = client.chat.completions.create(model=MODEL, messages=asking())
    assert response.choices[0].message.content == "461"
    assert response.choices[0].finish_reason == "stop"


def test_stream(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=asking(), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == "461"
    assert chunks[-1].usage.completion_tokens == 4
