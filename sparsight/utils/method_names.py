"""The methods and their parts by name. Importing their code imports torch, which takes seconds."""

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

PARTS = {
    "score": (
        "post-vision", "accumulated", "last-window", "elite-window", "text-grounded", "mixkv", "bacon",
        "future-queries", "reconstruction", "temporal-change", "distinct-values", "recency", "random",
    ),
    "allocate": (
        "uniform", "sparsity", "pyramid", "shared-mass", "strength-skewness", "text-vision", "across-heads",
        "across-layers", "visual-heads",
    ),
    "reduce": ("evict", "merge-nearest", "merge-similar"),
    "decode": ("grow", "fixed-point", "sliding", "heavy-hitter", "last-query", "recall"),
}  # fmt: skip
"""The kinds of each part of a method, as in :data:`sparsight.compression.recipe.KINDS`."""
