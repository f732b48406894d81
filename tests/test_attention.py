import pytest
import torch

from sparsight import attention
from sparsight.attention import is_causal


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("past", [0, 3])
def test_a_mask_is_causal_unless_a_query_sees_a_later_key(monkeypatch, past, rows, eager):
    monkeypatch.setattr(attention, "MASK_ROWS", rows)
    causal = torch.ones(2, 1, 9, 9 + past, dtype=torch.bool).tril(past)
    causal[1, :, :, 0] = False

    def given(mask):
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if eager else mask

    assert is_causal(given(causal))
    for query in range(9):
        for key in range(9 + past):
            mask = causal.clone()
            mask[1, :, query, key] = True
            assert is_causal(given(mask)) == (key <= query + past)


def test_without_a_mask_and_with_padding_alone_attention_is_causal():
    assert is_causal(None)
    assert is_causal(torch.ones(2, 5))
