"""The cache that a user hands to ``model.generate``, and what it is made of."""

from sparsight.cache.compressed_cache import CompressedCache
from sparsight.cache.report import Report

__all__ = ["CompressedCache", "Report"]
