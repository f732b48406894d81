"""What differs between model families, as a table: the tokens that stand for vision, and the places they stand for."""

from dataclasses import dataclass

from sparsight.tiles import Layout, base_and_tiles, merged_patches, whole_grid


@dataclass(frozen=True)
class Family:
    """Facts about one model family.

    Args:
        model_type: ``config.model_type`` in transformers.
        layout: the order in which pixels become vision tokens.
        token_fields: config fields that hold the ids of image and video tokens.
    """

    model_type: str
    layout: Layout
    token_fields: tuple[str, ...] = ("image_token_id",)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", whole_grid),
        Family("llava_next", base_and_tiles),
        Family("qwen2_5_vl", merged_patches, token_fields=("image_token_id", "video_token_id")),
    )
}
