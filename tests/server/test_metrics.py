"""Metrics and the access log, after requests to a server that runs."""

import json
import logging
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import sparsight
from sparsight import SamplingParams
from sparsight.server.access_log import LOGGER, JsonFormatter, LineFormatter
from sparsight.server.app import create_app
from sparsight.server.metrics import Metrics, Observation
from sparsight.server.settings import Settings
from tests.engine.requests import Ask, add, engine
from tests.server.conftest import MODEL, RunningServer, asking, image_loader

SECONDS = ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time",
           "request_prefill_time", "request_decode_time")  # fmt: skip
"""Histograms of times."""


def scrape(server: RunningServer) -> dict[str, float]:
    """Values by name, with labels in braces and without the prefix."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        text = response.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name.removeprefix("sparsight:") + "".join(f"{{{each}}}" for each in sample.labels.values()): sample.value
        for sample in samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def wait_for(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Lines of the log, which are written after the response has been sent."""
    while len(lines) < count:
        time.sleep(0.01)
    return lines


class Difference:
    """What has been added to the metrics of a server since it was made."""

    def __init__(self, server: RunningServer) -> None:
        self._server, self._before = server, scrape(server)

    def __getitem__(self, name: str) -> float:
        return scrape(self._server).get(name, 0) - self._before.get(name, 0)


@pytest.fixture(scope="module")
def fresh() -> Iterator[RunningServer]:
    """A server of which nothing has been requested."""
    model, processor = sparsight.load()
    settings = Settings(max_answers=2)
    with RunningServer(create_app(sparsight.Engine(model, processor), MODEL, settings, image_loader())) as running:
        yield running


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged from now on."""
    records: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(json.loads(JsonFormatter().format(record)))

    handler, level = Keep(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield records
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


def test_requests_are_counted_and_timed(fresh: RunningServer) -> None:
    added = Difference(fresh)
    response = fresh.client().chat.completions.create(model=MODEL, messages=asking(), n=2)
    usage = response.usage
    assert added["prompt_tokens_total"] == usage.prompt_tokens == 587
    assert added["generation_tokens_total"] == usage.completion_tokens == 8
    assert added["request_success_total{stop}"] == 2
    counts = {name: added[f"{name}_seconds_count"] for name in SECONDS}
    assert counts.pop("inter_token_latency") == 8 - 2
    assert set(counts.values()) == {1}
    queue, prefill, decode = (added[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode"))
    first, last = (added[f"{name}_seconds_sum"] for name in ("time_to_first_token", "e2e_request_latency"))
    assert min(queue, prefill, decode) > 0
    assert first == pytest.approx(queue + prefill)
    assert max(first, decode) < last
    assert added["kept_ratio_sum"] == pytest.approx(usage.sparsight["kept"] / usage.prompt_tokens)
    assert (added["vision_cache_misses_total"], added["vision_cache_hits_total"]) == (1, 0)
    fresh.client().chat.completions.create(model=MODEL, messages=asking(), max_tokens=2)
    assert added["request_success_total{length}"] == 1
    assert (added["vision_cache_misses_total"], added["vision_cache_hits_total"]) == (1, 1)


def test_gauges_say_what_runs(fresh: RunningServer) -> None:
    idle = scrape(fresh)
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_bytes", "full_kv_bytes")
    assert [idle[name] for name in gauges] == [0] * 5
    stream = fresh.client().chat.completions.create(
        model=MODEL, messages=asking(), stream=True, max_tokens=400, extra_body={"ignore_eos": True}
    )
    next(stream)
    busy = scrape(fresh)
    assert (busy["num_requests_running"], busy["num_requests_waiting"]) == (1, 0)
    assert busy["kv_cache_usage_perc"] == busy["kv_bytes"] / busy["kv_memory_bytes"] > 0
    assert busy["kv_bytes"] < busy["full_kv_bytes"]
    added = Difference(fresh)
    stream.close()
    while scrape(fresh)["num_requests_running"]:
        time.sleep(0.01)
    assert [scrape(fresh)[name] for name in gauges] == [0] * 5
    assert added["request_success_total{aborted}"] == 1


def test_rejections_are_counted_by_their_code(fresh: RunningServer) -> None:
    added = Difference(fresh)
    client = fresh.client()
    for fields in ({"model": "x", "messages": asking()}, {"model": MODEL, "messages": asking(), "n": 3}):
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**fields)
    assert added["request_rejected_total{model_not_found}"] == 1
    assert added["request_rejected_total{invalid_request_error}"] == 1
    assert added["e2e_request_latency_seconds_count"] == 0


def test_a_failed_request_is_an_error() -> None:
    with engine() as running:
        metrics = Metrics(running, ())
        handle = running.add(inputs={"pixels": 1}, params=SamplingParams(n=2))
        running.run()
        assert Observation(metrics).end(handle, 2, 10) == ["error", "error"]
        assert metrics.registry.get_sample_value("sparsight:request_success_total", {"finished_reason": "error"}) == 2
        assert metrics.registry.get_sample_value("sparsight:prompt_tokens_total") == 0


def test_servers_share_no_metrics() -> None:
    with engine() as one, engine() as other:
        handle = add(one, "llava", Ask())
        one.run()
        first, second = Metrics(one, ()), Metrics(other, ())
        Observation(first).pieces(handle, handle.take())
        name = "sparsight:generation_tokens_total"
        assert (first.registry.get_sample_value(name), second.registry.get_sample_value(name)) == (6, 0)


def test_each_request_is_one_line_without_its_content(fresh: RunningServer, lines: list[dict[str, Any]]) -> None:
    client = fresh.client(api_key="a-secret-key")
    response = client.chat.completions.with_raw_response.create(model=MODEL, messages=asking())
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a\x1b[31m b")
    answered, missing = wait_for(lines, 2)
    assert answered["request_id"] == response.headers["x-request-id"]
    assert {name: answered[name] for name in ("level", "method", "path", "status")} == {
        "level": "INFO", "method": "POST", "path": "/v1/chat/completions", "status": 200,
    }  # fmt: skip
    assert (answered["prompt_tokens"], answered["completion_tokens"], answered["finish_reason"]) == (587, 4, "stop")
    assert 0 < answered["seconds"] < 60
    assert missing["path"] == "/v1/models/a\\x1b[31m b"
    assert (missing["status"], missing["error"]) == (404, "model_not_found")
    text = json.dumps(lines)
    assert "secret" not in text and "JU" not in text and "base64" not in text


def test_a_client_that_leaves_is_logged(fresh: RunningServer, lines: list[dict[str, Any]]) -> None:
    client = fresh.client(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model=MODEL, messages=asking(), max_tokens=1000, extra_body={"ignore_eos": True})
    wait_for(lines, 1)
    assert (lines[0]["status"], lines[0].get("finish_reason", "aborted")) == (499, "aborted")


def test_a_stream_that_its_client_leaves_is_no_error(fresh: RunningServer, lines: list[dict[str, Any]]) -> None:
    stream = fresh.client().chat.completions.create(
        model=MODEL, messages=asking(), stream=True, max_tokens=1000, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    wait_for(lines, 1)
    assert (lines[0]["status"], lines[0]["finish_reason"], lines[0].get("error")) == (200, "aborted", None)
    assert 0 < lines[0]["completion_tokens"] < 1000


def test_prompts_are_logged_if_the_operator_wants_them(lines: list[dict[str, Any]]) -> None:
    model, processor = sparsight.load()
    app = create_app(sparsight.Engine(model, processor), MODEL, Settings(log_prompts=True), image_loader())
    with RunningServer(app) as running:
        running.client().chat.completions.create(model=MODEL, messages=asking("How much is JO?"), max_tokens=1)
    assert lines[0]["prompt"] == ["How much is JO?"]


def test_a_line_of_text_has_the_fields_and_cannot_be_forged() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": "/a b\nstatus=200", "status": 404, "error": "not_found"}
    line = LineFormatter().format(record)
    assert line.endswith(' INFO request path="/a b\\nstatus=200" status=404 error=not_found')
    assert "\n" not in line
