"""Benchmarks that the documentation quotes, with their results."""
