"""``python -m sparsight``: the same as the ``sparsight`` command."""

from sparsight.cli import main

# Processes that are spawned import this module again.
if __name__ == "__main__":
    main()
