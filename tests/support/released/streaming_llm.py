"""StreamingLLM (arXiv 2309.17453), "Local" in the papers on vision-language models."""


def streaming_llm(length, keep, sinks=4):
    """Positions of the first `sinks` tokens and of the last `keep - sinks`.

    Paper: four sinks and a sliding window; positions are those within the cache. Two released re-implementations
    agree on the choice: KVCache-Factory (`StreamingLLMKVCluster`, run with the window `keep - 4`) and ElasticCache
    (`kv_cache.py`, `LocalCache`, `--start-size 1` by default, so one sink). Both leave the rotary positions of the
    prompt in the keys.
    """
    return list(range(length)) if keep >= length else [*range(sinks), *range(length - (keep - sinks), length)]
