"""Head scores: which KV heads of a model read the text of an image (SparseMM, arXiv 2506.05344)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.feature_extraction_utils import BatchFeature

from sparsight.cache.compressed_cache import compressible
from sparsight.models.families import FAMILIES
from sparsight.models.inputs import prepare
from sparsight.models.layouts import Tile, find_tiles
from sparsight.models.loading import Checkpoint
from sparsight.reader.transcript import Place, Transcript
from sparsight.utils.suggest import unknown

PROMPT = "Read the page."


def head_scores(model: Any, checkpoint: Checkpoint, transcripts: Iterable[Transcript]) -> list[list[float]]:
    """Score every KV head by how often it attends most to the vision token that shows the next text token.

    The right text of each image is fed to the model token by token (teacher forcing). A query head gets ``1 / n`` for
    each text token where the key that it attends to most is one of the ``n`` vision tokens that show the next text
    token. Scores are sums over tokens, and means over images and over the query heads that share a KV head.

    As in the authors' code (``hit_score``), the key is the highest of all keys, text included, and scores are sums over
    an image's tokens. There the images are 1,000 of SynthDoG, the prompt asks for all OCR results, the model reads
    freely, a token counts only if its text occurs in exactly one annotated chunk, and all patches that the chunk's box
    touches count as showing it. Here the images are those of ``transcripts``, the prompt is "Read the page.", every
    token counts, and the patches that show it are those at its characters' positions.

    Args:
        model: the checkpoint's model.
        checkpoint: with a fast tokenizer, which knows the characters of each token.
        transcripts: at least one.

    Returns:
        Scores by layer (of those that can be compressed) and KV head.

    Raises:
        ValueError: there are no transcripts, or the model's family is not supported.
    """
    config = model.get_decoder().config
    layers = compressible(config)
    scores = [_scores_of(model, checkpoint, transcript, layers) for transcript in transcripts]
    if not scores:
        raise ValueError("Head scores need at least one image with its text.")
    by_query_head = torch.stack(scores).mean(0)
    return by_query_head.unflatten(1, (config.num_key_value_heads, -1)).mean(-1).tolist()


def _scores_of(model: Any, checkpoint: Checkpoint, transcript: Transcript, layers: Sequence[int]) -> Tensor:
    """Scores of the query heads on one image, ``[L, H]``."""
    inputs = BatchFeature(dict(prepare(checkpoint, [transcript.picture], PROMPT)))
    family = FAMILIES.get(checkpoint.config.model_type)
    if family is None:
        raise unknown("model type", checkpoint.config.model_type, FAMILIES)
    tiles = find_tiles(family.layout, checkpoint.config, inputs, checkpoint.processor.image_processor)
    tokens = checkpoint.processor.tokenizer(transcript.text, add_special_tokens=False, return_offsets_mapping=True)
    shown = [vision_tokens(tiles, transcript.places[start:stop]) for start, stop in tokens["offset_mapping"]]
    answer = torch.tensor([tokens["input_ids"]], device=model.device)
    inputs = inputs.to(model.device, model.dtype)
    language = model.get_decoder()
    with torch.no_grad():
        cache = DynamicCache(config=language.config)
        model(**inputs, past_key_values=cache, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
        with _eager(language):
            attentions = model(
                input_ids=answer, attention_mask=mask, past_key_values=cache, output_attentions=True
            ).attentions
    # The query of a token predicts the next token.
    return torch.stack([head_hits(attentions[layer][0, :, :-1], shown[1:]) for layer in layers])


def vision_tokens(tiles: Iterable[Tile], places: Iterable[Place | None]) -> set[int]:
    """Prompt positions of the vision tokens that show some places of the image."""
    return {
        int(tile.tokens[min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)])
        for tile in tiles
        for rows, columns in [tile.tokens.shape]
        for x, y in (place for place in places if place is not None)
    }


def head_hits(attention: Tensor, shown: Sequence[set[int]]) -> Tensor:
    """Score of each head ``[H]``.

    Args:
        attention: attention weights ``[H, n, T]`` of ``n`` queries.
        shown: for each query the key positions that count as a hit.
    """
    top_keys = attention.argmax(-1).tolist()
    hits = [sum(1 / len(keys) for key, keys in zip(head, shown, strict=True) if key in keys) for head in top_keys]
    return torch.tensor(hits, dtype=torch.float32)


@contextmanager
def _eager(language: Any) -> Iterator[None]:
    """Use eager attention, which returns its weights, in a model's language part meanwhile."""
    own = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        yield
    finally:
        language.set_attn_implementation(own)
