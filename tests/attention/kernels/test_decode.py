"""The decode kernels over entries held, against the torch version."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.attention import kernels
from tests.attention.kernels.conftest import DEVICE
from tests.cache.stores import filled

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
from sparsight.attention.kernels import decode as kernel

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (2e-3, 2e-3)}


def check(store, query, scaling=0.3):
    """Kernels and torch say the same of the same entries: the output, and the attention that every slot received."""
    states = [each.to(DEVICE) for each in (query, store.keys, store.values, store.flat_positions)]
    rows = [each.to(DEVICE) for each in (store.starts, store.used)]
    longest = max(store.capacities)
    output, received = kernels.attend_and_score(*states, *rows, longest, scaling)
    expected, expected_received = store.attend_and_score(query, None, scaling)
    rtol, atol = TOLERANCE[query.dtype]
    assert output.dtype == expected.dtype
    assert received.dtype == torch.float32
    assert_close(output.cpu(), expected, rtol=rtol, atol=atol)
    assert_close(received.cpu(), expected_received, rtol=rtol, atol=atol)
    alone = kernels.attend(*states, *rows, int(store.used.max()), scaling)
    assert_close(alone.cpu(), store.attend(query, None, scaling), rtol=rtol, atol=atol)
    return output.cpu()


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["dense", "ragged"]),
    counts=st.lists(st.integers(1, 150), min_size=2, max_size=4).filter(lambda counts: len(counts) % 2 == 0),
    group=st.sampled_from([1, 2, 7]),
    size=st.sampled_from([1, 8, 24, 80]),
    dtype=DTYPES,
    programs=st.sampled_from([1, 5, 512]),
    vacant=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_attention_over_rows_of_different_lengths_equals_torchs(
    kind, counts, group, size, dtype, programs, vacant, seed
):
    store, _ = filled(kind, counts, size=size, dtype=dtype, seed=seed)
    for step in range(vacant):
        # Vacated slots lie anywhere; one entry of each row stays.
        gone = torch.tensor([count > step + 1 for count in counts])
        slots = torch.tensor([(5 * step) % count for count in counts])
        store.vacate((torch.arange(max(store.capacities)) == slots[:, None]) & gone[:, None])
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(counts) // 2, 2 * group, 1, size, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "PROGRAMS", programs)
        check(store, query)


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_heads(size, dtype):
    query = torch.randn(1, 4, 1, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(filled("ragged", [70, 3], size=size, dtype=dtype)[0], query)


def test_values_may_have_another_size_than_keys():
    store, _ = filled("dense", [9, 9, 4, 4], size=24, value_size=16)
    output = check(store, torch.randn(2, 4, 1, 24, generator=torch.Generator().manual_seed(0)))
    assert output.shape == (2, 4, 1, 16)


def test_the_usual_scaling_is_that_of_the_heads_size():
    store, _ = filled("ragged", [9, 4], size=16)
    query = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    assert_close(check(store, query, None), check(store, query, 0.25))


def test_logits_of_any_size_are_safe():
    store, _ = filled("dense", [40], kv_heads=1)
    check(store, 1000 * torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0)))
