"""Prometheus metrics: vLLM's names with the prefix ``sparsight:``, and what compression makes of the KV memory."""

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sparsight.engine.engine import Engine
from sparsight.engine.request import Handle, Piece
from sparsight.server.schema import ERRORS

router = APIRouter()

PREFIX = "sparsight:"

FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
KEPT = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1)
"""Upper bounds of the histograms' buckets: seconds, and shares."""


class Request(Protocol):
    """A request that has not ended."""

    @property
    def queued(self) -> bool:
        """Whether its prompt is not being processed yet."""


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        engine: its load, memory and vision cache are read at each scrape.
        active: the requests that have not ended.
    """

    def __init__(self, engine: Engine, active: Collection[Request]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, active))
        ProcessCollector(registry=self.registry)
        self.first_token = self._histogram("time_to_first_token_seconds", "Time to the first token.", FIRST_TOKEN)
        self.token = self._histogram("inter_token_latency_seconds", "Time between two tokens of an answer.", TOKEN)
        self.latency = self._histogram("e2e_request_latency_seconds", "Time to the end of a request.", REQUEST)
        self.queue = self._histogram("request_queue_time_seconds", "Time until a prompt is taken up.", REQUEST)
        self.prefill = self._histogram("request_prefill_time_seconds", "Time of a prompt's prefill.", REQUEST)
        self.decode = self._histogram("request_decode_time_seconds", "Time from the first token to the last.", REQUEST)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were processed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.success = self._counter("request_success", "Answers that ended, by reason.", "finished_reason")
        self.rejected = self._counter("request_rejected", "Requests that got an error, by its code.", "reason")
        self.prefix_queries = self._counter("prefix_cache_queries", "Tokens of prompts looked for in host memory.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Tokens of prompts found there.")
        self.kept = self._histogram("kept_ratio", "Share of a prompt's KV entries that were kept.", KEPT)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)


class Observation:
    """Measures one request, from now on.

    Args:
        metrics: where the measurements go.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._arrived = metrics, time.perf_counter()
        self._newest: dict[int, float] = {}

    def pieces(self, handle: Handle, pieces: Sequence[Piece]) -> None:
        """Record pieces."""
        metrics = self._metrics
        for piece in pieces:
            if piece.token is None:
                continue
            if not self._newest:
                metrics.first_token.observe(piece.time - self._arrived)
                metrics.prefill.observe(piece.time - (handle.admitted or piece.time))
            elif piece.answer in self._newest:
                metrics.token.observe(piece.time - self._newest[piece.answer])
            self._newest[piece.answer] = piece.time
            metrics.generation_tokens.inc()

    def end(self, handle: Handle, number: int, prompt_tokens: int) -> list[str]:
        """Record the end of a request with a number of answers; returns why each of them ended."""
        metrics, answers = self._metrics, handle.completions
        reasons = [answer.finish_reason for answer in answers]
        reasons += ["aborted" if handle.error is None else "error"] * (number - len(reasons))
        for reason in reasons:
            metrics.success.labels(reason).inc()
        metrics.latency.observe(time.perf_counter() - self._arrived)
        if handle.admitted is not None:
            metrics.queue.observe(handle.admitted - self._arrived)
            metrics.prompt_tokens.inc(prompt_tokens)
        if answers:
            entries = answers[0].report.kept_per_layer()
            metrics.prefix_queries.inc(prompt_tokens)
            metrics.prefix_hits.inc(answers[0].reused_tokens)
            metrics.decode.observe(max(answer.decode_seconds for answer in answers))
            metrics.kept.observe(sum(entries) / len(entries) / prompt_tokens)
        return reasons


class _EngineCollector(Collector):
    """Reads the state of the engine and the queue at each scrape."""

    def __init__(self, engine: Engine, active: Collection[Request]) -> None:
        self._engine, self._active = engine, active

    def collect(self) -> Iterator[Metric]:
        stats, size = self._engine.stats, self._engine.kv_bytes
        waiting = sum(request.queued for request in self._active)
        gauges = {
            "num_requests_running": (stats.running, "Requests that are being processed."),
            "num_requests_waiting": (waiting, "Requests that wait for their prefill."),
            "kv_cache_usage_perc": (stats.kv_bytes / size, "Share of the KV memory that is taken; 1 is all of it."),
            "kv_memory_bytes": (size, "KV memory of the engine."),
            "kv_bytes": (stats.kv_bytes, "KV memory of running answers, at the longest that each may become."),
            "full_kv_bytes": (stats.full_kv_bytes, "KV memory of the same answers with the full cache."),
            "host_bytes": (stats.host_bytes, "Full keys and values in host memory."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value)
        yield CounterMetricFamily(PREFIX + "vision_cache_hits", "Images encoded before.", stats.vision_hits)
        yield CounterMetricFamily(PREFIX + "vision_cache_misses", "Images that were encoded.", stats.vision_misses)


@router.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
async def metrics(request: HTTPRequest) -> Response:
    """Metrics in Prometheus's text format."""
    own: Metrics = request.app.state.service.metrics
    return Response(generate_latest(own.registry), media_type=CONTENT_TYPE_LATEST)
