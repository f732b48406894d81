"""The attention function that transformers calls, and the kernels behind it."""
