"""The methods by name. Importing their code imports torch, which takes seconds; this module does not."""

METHODS = {
    "vl-cache": "VLCache",
    "elastic": "ElasticCache",
    "h2o": "H2O",
    "streaming-llm": "StreamingLLM",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "adakv": "AdaKV",
    "prefixkv": "PrefixKV",
    "look-m": "LookM",
    "aircache": "AirCache",
    "sparsemm": "SparseMM",
    "mixkv": "MixKVCache",
    "bacon": "BACONCache",
    "tgv-kv": "TGVKV",
    "expected-attention": "ExpectedAttention",
    "kvzip": "KVzip",
    "infinipot-v": "InfiniPotV",
    "sparsight": "Sparsight",
    "sparsight-recall": "SparsightRecall",
    "random": "RandomCache",
    "full": "Full",
}
"""Each method's function in :mod:`sparsight.methods`."""

ALIASES = {"local": "streaming-llm"}
"""Other names of a method in the literature."""
