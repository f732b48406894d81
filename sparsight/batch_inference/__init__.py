"""Batch inference: many questions about images, answered in batches, with results that survive a crash."""
