"""Conversations that the server has in host memory."""

from collections.abc import Iterator

import pytest

import sparsight
from sparsight.server.app import create_app
from sparsight.server.settings import Settings
from tests.server.conftest import MODEL, RunningServer, asking, image_loader

KEYS = ["a-key-of-the-tests-1", "a-key-of-the-tests-2"]


@pytest.fixture(scope="module")
def remembering() -> Iterator[RunningServer]:
    model, processor = sparsight.load()
    engine = sparsight.Engine(model, processor, kv_memory=2**28, host_memory=2**28)
    with RunningServer(create_app(engine, MODEL, Settings(), image_loader(), KEYS)) as running:
        yield running


def test_a_later_question_computes_its_own_tokens_and_no_other_key_shares_them(remembering: RunningServer) -> None:
    ours, theirs = (remembering.client(api_key=key) for key in KEYS)
    first = ours.chat.completions.create(model=MODEL, messages=asking())
    turn = [*asking(), {"role": "assistant", "content": "461"}, {"role": "user", "content": "How much is CY?"}]
    second = ours.chat.completions.create(model=MODEL, messages=turn)
    assert second.choices[0].message.content == "883"
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 10
    other = theirs.chat.completions.create(model=MODEL, messages=turn)
    assert other.choices[0].message.content == "883"
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    again = ours.responses.create(model=MODEL, input="How much is JU?")
    assert again.usage.input_tokens_details.cached_tokens < 10
    metrics = ours.get("../metrics", cast_to=str)
    values = dict(line.split() for line in metrics.splitlines() if line.startswith("sparsight:prefix_cache"))
    hits, queries = (float(values[f"sparsight:prefix_cache_{name}_total"]) for name in ("hits", "queries"))
    assert second.usage.prompt_tokens_details.cached_tokens <= hits < queries
