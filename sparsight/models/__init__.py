"""Model families, patch grids, prompts, loading, inputs and images."""
