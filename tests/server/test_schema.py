"""Requests of strangers: what the API's description allows and does not allow, and malformed ones."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks

from tests.server.conftest import MODEL, asking

SECONDS = 20
"""A request without an answer by then hangs."""

QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": [*HealthCheck]}

load_all_checks()
# A request may be refused for what its description cannot say, such as special tokens in its texts.
EXCLUDED = CHECKS.get_by_names(["positive_data_acceptance"])


@pytest.fixture(scope="session")
def description(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.fixture(scope="session")
def connection(server):
    """A client for each request would load certificates each time."""
    with httpx2.Client(base_url=server.url, timeout=SECONDS) as opened:
        yield opened


OPERATIONS = [
    ("/health", "GET"),
    ("/metrics", "GET"),
    ("/ready", "GET"),
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/v1/responses", "POST"),
    ("/v1/sparsight/examples", "GET"),
    ("/v1/sparsight/kept/{id}", "GET"),
    ("/v1/sparsight/methods", "GET"),
]


def test_the_description_has_every_endpoint(description):
    described = [result.ok() for result in description.get_all_operations()]
    assert sorted((each.path, each.method.upper()) for each in described) == OPERATIONS


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(*each, POSITIVE) for each in OPERATIONS] + [(*each, NEGATIVE) for each in OPERATIONS if "POST" in each],
)
def test_responses_are_as_described(description, path, method, mode):
    with requests.Session() as session:

        @settings(max_examples=60 if method == "POST" else 5, **QUIET)
        @given(case=description[path][method].as_strategy(generation_mode=mode))
        def check(case):
            body = case.body
            if isinstance(body, dict) and isinstance(body.get("model"), str):
                # Beyond the first check of a request whose other fields are right.
                body["model"] = MODEL
                if mode is POSITIVE and isinstance(body.get("max_tokens"), int):
                    body["max_tokens"] = min(body["max_tokens"], 4)
            case.call_and_validate(excluded_checks=EXCLUDED, timeout=SECONDS, session=session)

        check()


GOOD = {"model": MODEL, "messages": asking()}

FIELDS = ("messages", "model", "n", "stop", "seed", "temperature", "top_p", "logprobs", "top_logprobs", "max_tokens",
          "max_completion_tokens", "presence_penalty", "frequency_penalty", "logit_bias", "stream", "stream_options",
          "user", "ignore_eos", "sparsight", "tools", "response_format")  # fmt: skip

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
LISTS = st.lists(st.just([[1]]) | st.just({"": 1}), min_size=5, max_size=8)
"""No field takes such a value."""

MALFORMED = st.one_of(
    st.binary(max_size=60).map(lambda data: b"\x00" + data),
    VALUES.filter(lambda value: not isinstance(value, dict)),
    st.dictionaries(st.sampled_from(FIELDS[1:]) | st.text(max_size=8), VALUES, max_size=6),
    st.builds(lambda field, value: GOOD | {field: value}, st.sampled_from(FIELDS), LISTS),
    st.builds(lambda field, value: GOOD | {f"x{field}": value}, st.text(max_size=12), VALUES),
    st.builds(lambda value: GOOD | {"messages": value}, VALUES),
    st.builds(lambda value: GOOD | {"messages": [{"role": "user", "content": value}]}, LISTS | st.integers()),
    st.builds(lambda url: {"model": MODEL, "messages": asking(url=url)}, st.text(min_size=1, max_size=60)),
)


def send(connection, content, kind="application/json"):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    return connection.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})


HARD = (b'{"model": "\\ud800"}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b'{"temperature": NaN}', b"")


@settings(max_examples=100, **QUIET)
@given(contents=st.lists(MALFORMED, min_size=10, max_size=10))
@example(contents=HARD)
def test_a_thousand_malformed_requests_are_refused(connection, contents):
    with ThreadPoolExecutor(len(contents)) as pool:
        responses = list(pool.map(partial(send, connection), contents))
    for response in responses:
        assert 400 <= response.status_code < 500
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert error["type"] == "invalid_request_error"


def test_a_good_request_is_answered_after_them(server, client, connection):
    for content in (b"{", b"\xff", b"[]", b"null"):
        assert send(connection, content).status_code == 400
    answer = client.chat.completions.create(**GOOD)
    assert answer.choices[0].message.content == "461"
    assert not server.service.active


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_other_content_types(connection, kind):
    response = send(connection, GOOD, kind)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The body must be a JSON object, sent as application/json."
