import pytest
import torch
from transformers import LlamaConfig

from sparsight.bench import machine
from sparsight.bench.shapes import random_model

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ENTRY = 2 * 8 * 4
"""Bytes of one key and one value of a head in float32."""


@pytest.fixture(scope="session")
def model():
    return random_model(TINY, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(machine, "COPIED_BYTES", {"cpu": 2**16})
