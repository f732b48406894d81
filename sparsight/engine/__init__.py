"""Running a model over a compressed cache."""
