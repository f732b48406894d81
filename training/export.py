"""Stage `export`: write the trained model as a checkpoint folder that `from_pretrained` reads."""

from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from training.prompt import CHAT_TEMPLATE


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: images to 336 x 336 pixels in -1..1, `<image>` to 576 tokens."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def export(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bf16; a model card in the folder is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    half = LlavaForConditionalGeneration(model.config)
    torch.nn.Module.to(half, torch.bfloat16)
    half.load_state_dict(state)
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=300,
    )
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    processor(tokenizer).save_pretrained(folder)
