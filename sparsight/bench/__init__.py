"""Speed and memory of methods against plain transformers and the machine's bandwidth, on the same model."""
