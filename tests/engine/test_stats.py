"""What an engine says about its load and memory."""

from sparsight.engine.stats import EngineStats
from tests.engine.requests import Ask, add, engine

IDLE = EngineStats(running=0, kv_bytes=0, full_kv_bytes=0, host_bytes=0, vision_hits=0, vision_misses=0)


def test_requests_run_and_leave():
    with engine() as running:
        assert running.stats == IDLE
        two, one = add(running, "llava", Ask(tokens=3), n=2), add(running, "llava", Ask(tokens=3))
        assert two.admitted is None
        assert running.stats.running == 0
        running.step()
        assert running.stats.running == 1
        assert two.admitted is not None and one.admitted is None
        while not one.started:
            running.step()
        assert one.admitted > two.admitted
        running.run()
        assert running.stats == EngineStats(0, 0, 0, 0, vision_hits=1, vision_misses=1)


def test_bytes_are_those_of_the_pool_and_of_the_full_cache_at_the_same_length():
    with engine() as running:
        ask = Ask(tokens=5)
        handle = add(running, "llava", ask, n=2)
        while not running._running:
            running.step()
        report = running._running[0].report
        pool = running._batch.pool
        assert running.stats.kv_bytes == sum(pool.extents.values()) * pool.slot_bytes
        per_token = report.full_bytes // report.prompt_tokens[0]
        assert running.stats.full_kv_bytes == 2 * per_token * (report.prompt_tokens[0] + ask.tokens - 1)
        running.abort(handle)
        running.step()
        assert running.stats.kv_bytes == running.stats.full_kv_bytes == 0
