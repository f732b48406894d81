import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsight import KVzip, Recipe
from sparsight.compression import AcrossLayers, reconstruction
from sparsight.compression.allocate import LayerStatistics
from sparsight.compression.reconstruction import largest_attention


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 3),
    length=st.integers(1, 40),
    count=st.integers(1, 40),
    block=st.sampled_from([1, 200, 2**24]),
)
def test_largest_attention_is_that_of_the_full_matrix(group, kv_heads, length, count, block):
    torch.manual_seed(length)
    query = torch.randn(group * kv_heads, count, 8)
    context, repeated = torch.randn(kv_heads, length, 8), torch.randn(kv_heads, count, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reconstruction.BLOCK_ELEMENTS, "cpu", block)
        found = largest_attention(query, context, repeated, 0.7)
        value, output = torch.randn(kv_heads, length + count, 5), torch.empty(group * kv_heads, count, 5)
        assert torch.equal(largest_attention(query, context, repeated, 0.7, value, output), found)
    keys = torch.cat([context, repeated], dim=1).repeat_interleave(group, dim=0)
    hidden = torch.ones(count, length + count, dtype=torch.bool).triu(length + 1)
    attention = (0.7 * query @ keys.mT).masked_fill(hidden, -torch.inf).softmax(-1)
    assert_close(output, attention @ value.repeat_interleave(group, dim=0), rtol=1e-4, atol=1e-5)
    for head in range(kv_heads):
        for place in range(length):
            best = 0.0
            for one in range(head * group, (head + 1) * group):
                for row in range(count):
                    keys = torch.cat([context[head], repeated[head, : row + 1]])
                    best = max(best, float((0.7 * keys @ query[one, row]).softmax(0)[place]))
            assert_close(float(found[head, place]), best, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    budget=st.floats(0.01, 1.0),
)
def test_the_best_of_all_layers_and_heads_are_counted(layers, heads, length, budget):
    torch.manual_seed(length)
    scores = torch.rand(layers, heads, length)
    always = torch.zeros(length, dtype=torch.bool)
    always[-1] = True
    vision = torch.zeros_like(always)
    shares = AcrossLayers().shares([LayerStatistics(each, 0.0, vision, always) for each in scores], budget)
    counts = [[round(share * length) for share in layer] for layer in shares]
    total = max(layers * heads, round(budget * layers * heads * length))
    ranked = sorted(
        ((bool(always[t]), float(scores[layer, head, t]), layer, head) for layer in range(layers)
         for head in range(heads) for t in range(length)),
        reverse=True,
    )[:total]  # fmt: skip
    for layer in range(layers):
        for head in range(heads):
            assert counts[layer][head] == sum(each[2:] == (layer, head) for each in ranked)


@pytest.mark.parametrize(
    ("floor", "counts"),
    [(0.0, [[1, 3], [7, 1]]), (0.5, [[2, 3], [5, 2]]), (1.0, [[3, 3], [3, 3]])],
)
def test_a_floor_brings_every_head_nearer_to_the_equal_share(floor, counts):
    # Of 12 entries the first layer's second head wins two and the second layer's first head six; the last one stays.
    scores = torch.zeros(2, 2, 10)
    scores[0, 1, :2] = 1.0
    scores[1, 0, :6] = 2.0
    always = torch.arange(10) == 9
    statistics = [LayerStatistics(each, 0.0, torch.zeros_like(always), always) for each in scores]
    shares = AcrossLayers(floor=floor).shares(statistics, 0.3)
    assert [[round(10 * share) for share in layer] for layer in shares] == counts


def test_the_instructions_survive_json():
    made = KVzip(0.2, instructions=[[4, 5], [6]])
    assert Recipe.from_json(made.to_json()) == made
    assert json.loads(KVzip().to_json())["score"]["instructions"] is None


def test_instructions_are_two():
    with pytest.raises(ValueError, match="instructions must be token ids of two texts, got 1"):
        KVzip(instructions=[[4, 5]])
