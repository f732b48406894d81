"""``python -m sparsight``: the same as the ``sparsight`` command."""

from sparsight.cli import main

main()
