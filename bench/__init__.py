"""Benchmarks that the documentation quotes, with their committed results."""
