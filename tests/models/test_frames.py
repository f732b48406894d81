"""Frames are the vision tokens that each picture of a video becomes."""

import pytest
import torch

from sparsight.models.frames import find_frames
from sparsight.models.prompt import locate
from tests.support import models
from tests.support.families import TIMESTAMP, TINY, VISION_START

VIDEOS = {
    "llava_next_video": (3, 4),
    "llava_onevision": (3, 4),
    "qwen2_vl": (3, 8),
    "qwen2_5_vl": (3, 8),
    "qwen3_vl": (3, 8),
    "qwen3_vl_moe": (3, 8),
    "glm4v": (3, 8),
    "internvl": (3, 4),
    "smolvlm": (2, 4),
    "minicpmv4_6": (2, 4),
}
"""Frames of the tiny video of each family, and tokens of a frame."""


def test_every_family_with_videos_is_here():
    assert set(VIDEOS) == {name for name, tiny in TINY.items() if tiny.video}


@pytest.mark.parametrize("family", VIDEOS)
def test_a_frame_is_the_tokens_of_one_picture(family):
    model, inputs = models.model(family), models.inputs(family, models.ONE_VIDEO, models.Prompt(0, 30, 3, videos=1))
    prompt = locate(model.config, inputs, frames=True)
    for row, (videos, span) in enumerate(zip(prompt.frames, prompt.spans, strict=True)):
        ((frames),) = videos
        assert tuple(frames.shape) == VIDEOS[family]
        vision = prompt.vision_mask[row].nonzero()[:, 0]
        assert frames.flatten().tolist() == vision[: frames.numel()].tolist()
        assert int(frames[0, 0]) >= span.start
        # Frames that stand apart start after the same tokens.
        if (frames[1:, 0] - frames[:-1, -1] > 1).all():
            assert (inputs["input_ids"][row, frames[:, 0] - 1] == VISION_START).all()


def test_a_video_and_an_image_are_apart_and_so_are_two_videos_of_two_sizes():
    config = models.model("qwen2_vl").config
    token = config.video_token_id
    ids = torch.tensor([[1, *[token] * 8, 2, TIMESTAMP, *[token] * 6, 3, *[token] * 2, 4]])
    inputs = {"input_ids": ids, "video_grid_thw": torch.tensor([[2, 4, 4], [3, 2, 4], [1, 2, 4]])}
    ((first, second),) = find_frames(config, inputs, ids == token)
    assert first.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    # Frames of one size in a row are one video.
    assert second.tolist() == [[11, 12], [13, 14], [15, 16], [18, 19]]


def test_images_of_one_size_are_frames():
    model, inputs = models.model("llava"), models.inputs("llava", models.THREE_IMAGES, models.NO_IMAGE)
    prompt = locate(model.config, inputs, frames=True)
    assert [[tuple(video.shape) for video in videos] for videos in prompt.frames] == [[(3, 16)], []]
    assert [len(videos) for videos in prompt.select([1, 0, 0]).frames] == [0, 1, 1]
