"""What differs between model families, as a table: which config fields name the tokens that stand for vision."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Facts about one model family.

    Args:
        model_type: ``config.model_type`` in transformers.
        token_fields: config fields that hold the ids of image and video tokens.
    """

    model_type: str
    token_fields: tuple[str, ...] = ("image_token_id",)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava"),
        Family("llava_next"),
        Family("qwen2_5_vl", token_fields=("image_token_id", "video_token_id")),
    )
}
