"""Indexes of keys against loops over positions and components."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight.compression import BlockBounds, Exact, LowRank

SHAPES = {
    "heads": st.integers(1, 3),
    "group": st.integers(1, 3),
    "length": st.integers(1, 40),
    "size": st.sampled_from([2, 4, 8, 16]),
    "seed": st.integers(0, 999),
}


def states(heads, group, length, size, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, length, size, generator=generator) + 3 * torch.randn(heads, 1, size, generator=generator)
    return keys, torch.randn(heads, group, size, generator=generator)


@settings(deadline=None, max_examples=40)
@given(**SHAPES, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_exact_logits_are_query_times_key(heads, group, length, size, seed, dtype):
    keys, query = states(heads, group, length, size, seed)
    keys = keys.to(dtype)
    index = Exact().build(keys)
    assert index[0].data_ptr() == keys.data_ptr()
    logits = Exact().logits(query, index, length)
    assert logits.dtype == torch.float32
    for h in range(heads):
        for g in range(group):
            expected = [sum(q * k for q, k in zip(query[h, g].tolist(), key, strict=True)) for key in keys[h].tolist()]
            assert_close(logits[h, g], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(**SHAPES, block=st.integers(1, 7))
def test_block_bounds_are_the_largest_products_that_a_block_can_have(heads, group, length, size, seed, block):
    keys, query = states(heads, group, length, size, seed)
    part = BlockBounds(block)
    index = part.build(keys)
    logits = part.logits(query, index, length)
    assert logits.shape == (heads, group, length)
    for h in range(heads):
        for g in range(group):
            for j in range(length):
                start = j // block * block
                members = keys[h, start : start + block].tolist()
                bound = sum(
                    max(q * min(key[d] for key in members), q * max(key[d] for key in members))
                    for d, q in enumerate(query[h, g].tolist())
                )
                assert logits[h, g, j].item() == pytest.approx(bound, rel=1e-4, abs=1e-4)
    exact = Exact().logits(query, (keys,), length)
    assert (logits >= exact - 1e-4).all()
    # Two bounds a block.
    assert index[0].numel() == 2 * heads * size * -(-length // block)


@settings(deadline=None, max_examples=40)
@given(**SHAPES, rank=st.sampled_from([2, 4]), bits=st.sampled_from([4, 8]))
def test_low_rank_logits_are_those_of_keys_put_together_again_from_their_codes(
    heads, group, length, size, seed, rank, bits
):
    keys, query = states(heads, group, length, size, seed)
    rank, levels = min(rank, size), 2**bits - 1
    part = LowRank(rank, bits)
    codes, basis = part.build(keys)
    assert codes.dtype == torch.uint8
    assert codes.shape == (heads, length, rank * bits // 8)
    logits = part.logits(query, (codes, basis), length)
    for h in range(heads):
        centred = keys[h].double() - keys[h].double().mean(0)
        # The principal directions come from a decomposition of the keys themselves; the order does not matter.
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:rank]
        components = centred @ directions.mT
        for g in range(group):
            estimate = torch.zeros(length, dtype=torch.float64)
            room = 0.0
            for r in range(len(directions)):
                along = components[:, r]
                step = (along.max() - along.min()) / levels
                slope = query[h, g].double() @ directions[r]
                # A component is off by half a step at most.
                room += float(abs(slope) * step / 2)
                estimate += along * slope
            apart = logits[h, g].double() - estimate
            # Up to a constant.
            assert (apart - apart.mean()).abs().max() <= 2 * room + 1e-3


def test_eight_components_of_eight_bits_reproduce_keys_of_eight_components():
    keys, query = states(2, 2, 200, 8, 0)
    part = LowRank(8, 8)
    logits, exact = part.logits(query, part.build(keys), 200), Exact().logits(query, (keys,), 200)
    centred, expected = (each - each.mean(-1, keepdim=True) for each in (logits, exact))
    assert (centred - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_index_of_four_bits_takes_few_bytes():
    keys = torch.randn(4, 2900, 64, dtype=torch.bfloat16)
    resident = sum(each.nbytes for each in LowRank().build(keys))
    assert resident <= 0.04 * 2 * keys.nbytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(rank=3), "rank must be an even whole number of at least 2, got 3"),
        (lambda: LowRank(rank=0), "rank must be an even whole number of at least 2, got 0"),
        (lambda: LowRank(bits=3), "bits must be 4 or 8, got 3"),
        (lambda: BlockBounds(0), "block must be a whole number of at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
