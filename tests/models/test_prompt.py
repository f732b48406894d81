from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight.models.prompt import Span, locate
from tests.support import models, reference
from tests.support.families import IMAGE_TOKEN
from tests.support.models import NO_IMAGE, NO_TEXT_AFTER, ONE_IMAGE, THREE_IMAGES

CONFIG = models.model("llava").config


def test_post_vision_queries_follow_the_last_image():
    prompt = locate(CONFIG, models.inputs("llava", ONE_IMAGE, THREE_IMAGES))
    assert prompt.length == 65
    assert prompt.spans == (Span(34, 56, 65), Span(0, 53, 65))
    assert prompt.vision_mask.sum(-1).tolist() == [16, 48]


def test_the_last_window_is_used_if_no_text_follows_the_last_image():
    prompt = locate(CONFIG, models.inputs("llava", NO_TEXT_AFTER, NO_IMAGE, models.Prompt(0, 40, 0)))
    assert prompt.spans == (Span(16, 16, 40), Span(17, 17, 40), Span(0, 8, 40))


def test_right_padding():
    ids = torch.tensor([[1, IMAGE_TOKEN, 2, 3, 0, 0]])
    prompt = locate(CONFIG, {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])})
    assert prompt.spans == (Span(0, 2, 4),)


@settings(deadline=None)
@given(vision=st.lists(st.booleans(), min_size=1, max_size=50), padding=st.integers(0, 4))
def test_spans_equal_the_definition(vision, padding):
    ids = torch.tensor([[0] * padding + [IMAGE_TOKEN if flag else 5 for flag in vision]])
    mask = torch.tensor([[0] * padding + [1] * len(vision)])
    (span,) = locate(CONFIG, {"input_ids": ids, "attention_mask": mask}).spans
    assert [i - padding for i in range(span.post_vision, span.stop)] == reference.post_vision_rows(vision)


def test_token_types_mark_vision_tokens_for_any_family():
    types = torch.tensor([[0, 1, 2, 0, 0]])
    prompt = locate(
        SimpleNamespace(model_type="unheard_of"), {"input_ids": torch.ones(1, 5), "mm_token_type_ids": types}
    )
    assert prompt.vision_mask.tolist() == [[False, True, True, False, False]]


def test_sequences_are_selected_with_their_spans():
    prompt = locate(CONFIG, models.inputs("llava", ONE_IMAGE, THREE_IMAGES)).select([1, 1, 0])
    assert [span.start for span in prompt.spans] == [0, 0, 34]
    assert prompt.vision_mask.sum(-1).tolist() == [48, 48, 16]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "must hold 'input_ids'"),
        ({"input_ids": torch.tensor([1, 2])}, "must hold 'input_ids' of shape"),
        ({"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.ones(1)}, "no image token to stand for it"),
        (None, "must hold 'input_ids'"),
        ({"input_ids": [[1, 2]]}, "must hold 'input_ids' of shape"),
        ({"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 3)}, r"shape of 'input_ids', \[1, 2\], got"),
        ({"input_ids": torch.ones(2, 2), "mm_token_type_ids": torch.ones(1, 2)}, "'mm_token_type_ids' must have"),
        ({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.zeros(1, 2)}, "no valid token"),
        ({"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 0, 1]])}, "padding between"),
    ],
)
def test_inputs_that_are_not_prompts_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        locate(CONFIG, inputs)
