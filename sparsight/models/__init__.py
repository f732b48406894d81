"""What the library knows of models: families, patch grids, prompts, loading, pictures."""
