"""Real processors for the tiny models of ``families.py`` that can be built without torchvision."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as tr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests.support.families import PATCH, PINPOINTS, SIDE

SQUARE = {"height": SIDE, "width": SIDE}
SHORTEST = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
TILES = {"size": SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
QWEN = {"shortest_edge": 4 * PATCH**2, "longest_edge": 4 * PATCH**2 * 64}
PIXELS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
VISION = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}


def tokenizer(*words: str, **special: str) -> tr.PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, extra special tokens, and named special tokens for a processor."""
    special |= {f"word_{number}": word for number, word in enumerate(words)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=special
    )


def _llava() -> Any:
    words = tokenizer(image_token="<image>")
    return tr.LlavaProcessor(LlavaImageProcessorPil(**SHORTEST), words, PATCH, "default", num_additional_image_tokens=1)


def _llava_next() -> Any:
    images = LlavaNextImageProcessorPil(**SHORTEST, image_grid_pinpoints=PINPOINTS)
    words = tokenizer(image_token="<image>")
    return tr.LlavaNextProcessor(images, words, PATCH, "default", num_additional_image_tokens=1)


def _llava_next_video() -> Any:
    images = LlavaNextImageProcessorPil(**SHORTEST, image_grid_pinpoints=PINPOINTS)
    words = tokenizer(image_token="<image>", video_token="<video>")
    return tr.LlavaNextVideoProcessor(
        None, images, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava_onevision() -> Any:
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    words = tokenizer(image_token="<image>", video_token="<video>")
    return tr.LlavaOnevisionProcessor(images, words, None, (SIDE // PATCH) ** 2, "full")


def _qwen(kind: type) -> Callable[[], Any]:
    return lambda: kind(Qwen2VLImageProcessorPil(patch_size=PATCH, size=QWEN), tokenizer(**PIXELS, **VISION), None)


def _glm4v() -> Any:
    images = Glm4vImageProcessorPil(patch_size=PATCH, size={**QWEN, "shortest_edge": 8 * PATCH**2})
    return tr.Glm4vProcessor(images, tokenizer(image_token="<|image|>", video_token="<|video|>"), None)


def _internvl() -> Any:
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    return tr.InternVLProcessor(GotOcr2ImageProcessorPil(**TILES), words, None, image_seq_length=4)


def _idefics3() -> Any:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    names = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    return tr.Idefics3Processor(images, tokenizer(image_token="<image>", **names), image_seq_len=4)


def _ovis2() -> Any:
    words = tokenizer(
        *(f"<IMG_{word}>" for word in ("START", "GRID", "COL", "ROW", "END", "ATOM")), image_token="<image>"
    )
    return tr.Ovis2Processor(Ovis2ImageProcessorPil(**TILES), words, image_seq_length=4)


def _aya_vision() -> Any:
    words = tokenizer("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", image_token="<image>")
    return tr.AyaVisionProcessor(
        GotOcr2ImageProcessorPil(**TILES), words, patch_size=PATCH, img_size=SIDE, downsample_factor=2
    )


def _gemma3() -> Any:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return tr.Gemma3Processor(Gemma3ImageProcessorPil(size=SQUARE), tokenizer(**names), image_seq_length=4)


def _paligemma() -> Any:
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = (SIDE // PATCH) ** 2
    return tr.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))


def _minicpm() -> Any:
    names = ("image", "video", "image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    images = MiniCPMV4_6ImageProcessorPil(patch_size=PATCH, scale_resolution=8 * PATCH, max_slice_nums=4)
    videos = SimpleNamespace(slice_mode=True, downsample_mode="16x")
    return tr.MiniCPMV4_6Processor(images, videos, tokenizer(**{f"{name}_token": f"<{name}>" for name in names}))


@dataclass(frozen=True)
class Real:
    """A family's processor, the placeholder of an image in its text, and the vision token."""

    build: Callable[[], Any]
    placeholder: str
    token: str


REAL = {
    "llava": Real(_llava, "<image>", "<image>"),
    "vipllava": Real(_llava, "<image>", "<image>"),
    "llava_next": Real(_llava_next, "<image>", "<image>"),
    "llava_next_video": Real(_llava_next_video, "<image>", "<image>"),
    "llava_onevision": Real(_llava_onevision, "<image>", "<image>"),
    "qwen2_vl": Real(_qwen(tr.Qwen2VLProcessor), "<|image_pad|>", "<|image_pad|>"),
    "qwen2_5_vl": Real(_qwen(tr.Qwen2_5_VLProcessor), "<|image_pad|>", "<|image_pad|>"),
    "qwen3_vl": Real(_qwen(tr.Qwen3VLProcessor), "<|image_pad|>", "<|image_pad|>"),
    "glm4v": Real(_glm4v, "<|image|>", "<|image|>"),
    "internvl": Real(_internvl, "<IMG_CONTEXT>", "<IMG_CONTEXT>"),
    "idefics3": Real(_idefics3, "<image>", "<image>"),
    "ovis2": Real(_ovis2, "<image>", "<IMG_ATOM>"),
    "aya_vision": Real(_aya_vision, "<image>", "<|IMG_PATCH|>"),
    "gemma3": Real(_gemma3, "<start_of_image>", "<image_soft_token>"),
    "paligemma": Real(_paligemma, "<image>", "<image>"),
    "minicpmv4_6": Real(_minicpm, "<image>", "<image>"),
}
"""Left out: SmolVLM's, which needs another package; Mistral3's and Qwen3-VL-MoE's, which share those of others."""


def processor(family: str) -> Any:
    """A family's processor. Without torchvision there is no video processor, which images do not need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        return REAL[family].build()
