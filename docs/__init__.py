"""The parts of the documentation that are generated from registries and results."""
