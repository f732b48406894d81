import pytest
import torch

from sparsight.attention import interface
from sparsight.attention.interface import is_causal


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("past", [0, 3])
def test_a_mask_is_causal_if_every_token_sees_all_tokens_up_to_its_own(monkeypatch, past, rows, eager):
    monkeypatch.setattr(interface, "MASK_ROWS", rows)
    tokens = 9 + past
    # The prompt ends before the last token; the second sequence is padded.
    valid = torch.ones(2, tokens - 1, dtype=torch.bool)
    valid[1, : past + 1] = False
    causal = torch.ones(2, 1, 9, tokens, dtype=torch.bool).tril(past)
    causal[1, ..., : past + 1] = False

    def given(mask):
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if eager else mask

    assert is_causal(given(causal), valid)
    for row in range(2):
        for query in range(9):
            for key in range(tokens):
                mask = causal.clone()
                mask[row, :, query, key] ^= True
                is_padding = row == 1 and query == 0
                assert is_causal(given(mask), valid) == is_padding
    alone = torch.ones(2, tokens, dtype=torch.bool)
    assert is_causal(given(causal[:1]), alone)
    assert not is_causal(given(causal[1:]), alone)


def test_without_a_mask_and_with_padding_alone_attention_is_causal():
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert is_causal(None, valid)
    assert is_causal(torch.ones(2, 5), valid)
