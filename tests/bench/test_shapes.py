import pytest
import torch

from sparsight.bench.shapes import SHAPES, parameters, random_inputs, random_model, weight_bytes
from tests.bench.conftest import TINY

# What the models' authors give for the language part, and 64 more tokens, each embedded twice, where Llava pads the
# vocabulary.
PUBLISHED = {
    "llava-1.5-7b": 6_738_415_616 + 2 * 64 * 4096,
    "llava-1.5-13b": 13_015_864_320 + 2 * 64 * 5120,
    "llava-next-mistral-7b": 7_241_732_096 + 2 * 64 * 4096,
    "llava-next-34b": 34_388_917_248 + 2 * 64 * 7168,
    # The embedding is the head's there, and here each has its own.
    "qwen2.5-vl-3b": 3_085_938_688 + 151936 * 2048,
    "qwen2.5-vl-7b": 7_615_616_512,
}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_shape_has_the_weights_of_its_model(shape):
    assert parameters(SHAPES[shape]) == PUBLISHED[shape]


def test_every_shape_but_the_small_one_is_a_published_models():
    assert list(SHAPES) == ["small", *PUBLISHED]


def test_a_decode_step_reads_all_weights_but_the_embeddings(model):
    every = sum(weights.nbytes for weights in model.parameters())
    assert weight_bytes(model) == every - 64 * 32 * 4


def test_tied_embeddings_are_read_once_as_the_head():
    config = type(TINY)(**{**TINY.to_dict(), "tie_word_embeddings": True})
    tied = random_model(config, torch.device("cpu"), torch.bfloat16)
    assert weight_bytes(tied) == sum(weights.nbytes for weights in tied.parameters())


def test_the_model_is_the_same_every_time(model):
    again = random_model(TINY, torch.device("cpu"), torch.float32)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_prompts_are_vision_between_some_text(model):
    inputs = random_inputs(model, 150, 2)
    assert inputs["input_ids"].shape == (2, 150)
    assert inputs["input_ids"].max() < 64
    assert inputs["mm_token_type_ids"].tolist() == [[0] * 36 + [1] * 50 + [0] * 64] * 2
