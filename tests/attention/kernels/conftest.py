from collections.abc import Iterator

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="session")
def exact_products_of_bfloat16() -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as integers, and multiplies those: let it multiply what they stand for."""
    interpreter = pytest.importorskip(
        "triton.runtime.interpreter", reason="Triton is not installed: pip install triton (Linux)"
    )
    language = interpreter.tl
    product = interpreter.InterpreterBuilder.create_dot

    def widened(builder, states):
        return builder.cast_impl(states, language.float32) if states.dtype.scalar == language.bfloat16 else states

    def create_dot(builder, left, right, *rest):
        return product(builder, widened(builder, left), widened(builder, right), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield
