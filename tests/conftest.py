import logging
import os
from collections.abc import Iterator

import pytest
import torch

# The models are tiny: threads would only wait for each other, and the tests run in processes side by side.
torch.set_num_threads(1)

# Triton reads it when it is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Remove handlers that a test adds: they write to a stream that pytest closes when the test ends."""
    yield
    for name in (None, "sparsight", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [each for each in logger.handlers if type(each) is not logging.StreamHandler]
        logger.propagate = True
