"""When the kernels are used, and that answers are the same with them."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.testing import assert_close

from sparsight import CompressedCache, recipe
from sparsight.attention import kernels
from sparsight.cache import layer
from tests.support.models import NO_IMAGE, ONE_IMAGE, THREE_IMAGES, inputs, logits, model

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float32, "shape": (4, 256)}, True),
        ({"is_cuda": False}, False),
        ({"dtype": torch.float64}, False),
        ({"shape": (4, 257)}, False),
        ({"requires_grad": True}, False),
    ],
)
def test_kernels_take_what_they_know_on_a_gpu(changes, expected):
    plain = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (2, 3, 128), "requires_grad": False}
    states = SimpleNamespace(**plain), SimpleNamespace(**plain | changes)
    assert kernels.usable(*states) is expected
    with torch.no_grad():
        assert kernels.usable(*states) is (expected or "requires_grad" in changes)


def test_nothing_is_asked_of_triton_on_a_cpu():
    assert not kernels.usable(torch.zeros(2, 8))


@pytest.fixture
def interpreted(monkeypatch):
    """Lets every layer use the kernels, and counts how often they are called."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled for it, and this test's tensors are on the CPU")
    counts = {
        name: Mock(side_effect=getattr(kernels, name)) for name in ("attention_sums", "attend", "attend_and_score")
    }
    monkeypatch.setattr(kernels, "usable", lambda *states: True)
    # Nor do layers on a GPU take the one pass that a CPU takes.
    monkeypatch.setattr(layer, "is_plain", lambda *_, **__: False)
    for name, count in counts.items():
        monkeypatch.setattr(kernels, name, count)
    return counts


TOKENS = 3


@pytest.mark.parametrize("method", ["vl-cache", "elastic", "adakv", "h2o"])
def test_answers_are_the_same_with_the_kernels(method, request):
    language, batch = model("llava", "1:2"), inputs("llava", ONE_IMAGE, THREE_IMAGES)
    plain, fused = (CompressedCache(language, recipe(method, budget=0.3), batch) for _ in range(2))
    expected = logits(language, batch, TOKENS, past_key_values=plain)
    counts = request.getfixturevalue("interpreted")
    found = logits(language, batch, TOKENS, past_key_values=fused)
    layers = len(fused.compressed)
    used = "attend_and_score" if method == "h2o" else "attend"
    assert counts[used].call_count == layers * (TOKENS - 1)
    # Once for each sequence: VL-Cache takes scores and sparsity from the same rows, the others need scores alone.
    assert counts["attention_sums"].call_count == layers * 2
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    for index in range(layers):
        assert torch.equal(fused.kept_positions(index), plain.kept_positions(index))


def test_a_new_turn_goes_the_other_way(interpreted):
    language, batch = model("llama"), inputs("llama", NO_IMAGE)
    cache = CompressedCache(language, recipe("vl-cache", budget=0.5), batch)
    with torch.no_grad():
        language(**batch, past_key_values=cache)
        language(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    assert interpreted["attend"].call_count == 0
