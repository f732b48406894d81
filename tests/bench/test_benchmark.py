from itertools import count

import pytest
import torch

from sparsight import CompressedCache, recipe
from sparsight.bench import benchmark as module
from sparsight.bench.benchmark import (
    INTERRUPTED,
    TIME_UP,
    WARM_UP_TOKENS,
    BenchmarkConfig,
    cases,
    prefill_bytes,
    run_benchmark,
)
from sparsight.bench.kvpress import CannotRun, Kvpress
from sparsight.bench.measure import Sample
from sparsight.utils import memory
from tests.bench.conftest import ENTRY, TINY

SAMPLE = Sample(1.0, 0.1, 0.1, 0.5, 2.0, 10, 10, None)


def config(**changes):
    recipes = [recipe("full"), recipe("vl-cache", budget=0.1), recipe("elastic", budget=0.2)]
    return BenchmarkConfig(
        **{"contexts": [40], "batches": [2], "recipes": recipes, "against": ["transformers"]} | changes
    )


def run_all(chosen, model, kvpress=None):
    return list(run_benchmark(chosen, model, lambda *_: None, kvpress))


def test_cases_are_references_and_methods_with_their_prompts():
    found = [(case.method, case.budget, case.prompt_tokens) for case in cases(config(new_tokens=2, rounds=1), 40, 2)]
    assert found == [
        ("transformers", 1.0, 40),
        ("kept-length", 0.1, 4),
        ("kept-length", 0.2, 8),
        ("full", 1.0, 40),
        ("vl-cache", 0.1, 40),
        ("elastic", 0.2, 40),
    ]
    own = ["full", "vl-cache", "elastic"]
    assert [case.method for case in cases(config(against=[], new_tokens=2, rounds=1), 40, 2)] == own
    with_kvpress = cases(config(against=["kvpress"], new_tokens=2, rounds=1), 40, 2)
    assert [(case.method, case.budget) for case in with_kvpress[:2]] == [("kvpress", 0.1), ("kvpress", 0.2)]
    assert [case.method for case in with_kvpress[2:]] == own


def test_cases_are_interleaved_and_the_first_round_is_not_measured(model, monkeypatch):
    taken = []

    def record(model, input_ids, cache, new_tokens):
        method = cache.recipe.name if isinstance(cache, CompressedCache) else f"plain {input_ids.shape[1]}"
        taken.append((method, input_ids.shape[0], new_tokens))
        return SAMPLE

    monkeypatch.setattr(module, "measure", record)
    one = [recipe("vl-cache", budget=0.25)]
    done = []
    measured = list(
        run_benchmark(
            config(recipes=one, batches=[1, 2], new_tokens=7, rounds=2), model, lambda *progress: done.append(progress)
        )
    )
    turn = ["plain 40", "plain 10", "vl-cache"]
    rounds = [taken[start : start + 3] for start in range(0, len(taken), 3)]
    expected = [sorted((method, batch, 7) for method in turn) for batch in (1, 2) for _ in range(3)]
    assert [sorted(each) for each in rounds] == expected
    assert len(set(map(tuple, rounds[:3]))) > 1
    assert [len(case.samples) for size in measured for case in size] == [2] * 6
    assert all(len(case.bandwidths) == 2 and min(case.bandwidths) > 0 for size in measured for case in size)
    assert [step for _, step, _ in done] == [0, 1, 2, 3, 4, 5, 6]
    assert {total for *_, total in done} == {6}


def test_the_warm_up_round_is_short_and_small_sizes_come_first(model, monkeypatch):
    taken = []
    monkeypatch.setattr(module, "measure", lambda model, ids, cache, new: taken.append((*ids.shape, new)) or SAMPLE)
    chosen = config(contexts=[40, 60], batches=[1, 2], recipes=[recipe("full")], against=[], new_tokens=30, rounds=1)
    run_all(chosen, model)
    sizes = [(1, 40), (1, 60), (2, 40), (2, 60)]
    assert taken == [(*size, new) for size in sizes for new in (WARM_UP_TOKENS, 30)]


def test_when_the_time_is_up_complete_rounds_count_and_the_rest_has_a_reason(model, monkeypatch):
    # Every measurement takes a minute: two cases per round, so that three rounds and a half fit.
    seconds = count(60, 60)
    now = [0]
    monkeypatch.setattr(module, "measure", lambda *_: now.append(next(seconds)) or SAMPLE)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[-1])
    chosen = config(
        batches=[1, 2], recipes=[recipe("full"), recipe("h2o")], against=[], new_tokens=2, rounds=4, minutes=6.5
    )
    first, second = run_all(chosen, model)
    assert [(len(case.samples), case.reason) for case in first] == [(2, None)] * 2
    assert [(len(case.samples), case.reason) for case in second] == [(0, TIME_UP)] * 2


def test_an_interrupted_size_keeps_its_complete_rounds(model, monkeypatch):
    measurements = count()

    def interrupt(*_):
        # Two cases: warm-up, a complete round, and one case of the next.
        if next(measurements) == 5:
            raise KeyboardInterrupt
        return SAMPLE

    monkeypatch.setattr(module, "measure", interrupt)
    chosen = config(recipes=[recipe("full"), recipe("h2o")], against=[], new_tokens=2, rounds=4)
    running = run_benchmark(chosen, model, lambda *_: None)
    assert [(len(case.samples), case.reason) for case in next(running)] == [(1, None)] * 2
    with pytest.raises(KeyboardInterrupt):
        next(running)
    monkeypatch.setattr(module, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert [case.reason for case in next(run_benchmark(chosen, model, lambda *_: None))] == [INTERRUPTED] * 2


class RecordingKvpress(Kvpress):
    """Records the requests and measures nothing."""

    def __init__(self):
        self.requests = []

    def measure(self, budget, tokens, batch, new_tokens, needed):
        self.requests.append((budget, tokens, batch, new_tokens))
        if budget == 0.2:
            raise CannotRun("kvpress: no such case")
        return SAMPLE


def test_kvpress_is_interleaved_and_cases_that_it_cannot_run_have_a_reason(model, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: SAMPLE)
    kvpress = RecordingKvpress()
    (size,) = run_all(config(against=["transformers", "kvpress"], new_tokens=30, rounds=2), model, kvpress)
    assert sorted(kvpress.requests[:2]) == [(0.1, 40, 2, 8), (0.2, 40, 2, 8)]
    assert kvpress.requests[2:] == [(0.1, 40, 2, 30)] * 2
    assert [(case.budget, len(case.samples), case.reason) for case in size if case.method == "kvpress"] == [
        (0.1, 2, None),
        (0.2, 0, "kvpress: no such case"),
    ]
    assert all(len(case.samples) == 2 for case in size if case.method != "kvpress")


def test_without_kvpress_its_cases_have_a_reason(model, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: SAMPLE)
    refusal = CannotRun("kvpress cannot be installed: no matching distribution")
    (size,) = run_all(config(against=["kvpress"], new_tokens=2, rounds=1), model, refusal)
    assert [case.reason for case in size] == [str(refusal)] * 2 + [None] * 3


def test_cases_that_do_not_fit_are_not_measured(model, monkeypatch):
    tried = []
    monkeypatch.setattr(module, "measure", lambda model, input_ids, *_: tried.append(input_ids.shape[1]) or SAMPLE)
    short = prefill_bytes(TINY, 4, 2, 2, 4)
    monkeypatch.setattr(memory, "available_bytes", lambda device: short)
    (size,) = run_all(config(new_tokens=2, rounds=3), model)
    assert tried == [4] * 4
    assert [len(case.samples) for case in size] == [0, 3, 0, 0, 0, 0]
    assert size[0].reason.startswith("does not fit: about 0.0 GiB needed")
    assert size[1].reason is None


def test_a_case_that_runs_out_of_memory_does_not_stop_the_others(model, monkeypatch):
    def fail(model, input_ids, cache, new_tokens):
        if isinstance(cache, CompressedCache) and cache.recipe.name == "elastic":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return SAMPLE

    monkeypatch.setattr(module, "measure", fail)
    (size,) = run_all(config(new_tokens=2, rounds=2), model)
    assert {case.method: case.reason for case in size if case.reason} == {"elastic": "does not fit: memory ran out"}
    assert [len(case.samples) for case in size] == [2, 2, 2, 2, 2, 0]


def test_other_failures_are_not_hidden(model, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(module, "measure", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_all(config(new_tokens=2, rounds=1), model)


def test_the_full_cache_is_most_of_what_a_long_prompt_needs():
    cache = 3 * 2 * (1000 + 5) * ENTRY
    layer, states = cache // 3, (4 * 32 + 3 * 48) * 1000 * 4
    assert prefill_bytes(TINY, 1000, 1, 5, 4) == cache + layer + states
    assert prefill_bytes(TINY, 1000, 4, 5, 2) == 2 * (cache + layer + states)
