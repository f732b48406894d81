"""Speed and memory of methods, beside plain transformers and the machine's own limit, on the same model in turns."""
