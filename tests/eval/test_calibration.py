"""Head scores, against attention matrices of one pass over prompt and text."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sparsight.compression import VisualHeads
from sparsight.eval.calibration import PROMPT, head_hits, head_scores, vision_tokens
from sparsight.models.inputs import prepare
from sparsight.models.layouts import Tile
from sparsight.models.loading import load_checkpoint, load_model
from sparsight.reader import head_scores_path, model_path
from sparsight.reader.transcript import Transcript, random_transcript
from sparsight.utils.head_scores import read_scores
from tests.support import tiny

TEXT = "AB 123\nC 4"


@pytest.fixture(scope="module", params=["shipped", "llava_next"])
def checkpoint(request, tmp_path_factory):
    if request.param == "shipped":
        return load_checkpoint(str(model_path()))
    return load_checkpoint(str(tiny.llava_next(tmp_path_factory.mktemp(request.param))))


def transcript(checkpoint, seed):
    rng = np.random.default_rng(seed)
    if checkpoint.config.model_type == "llava":
        return random_transcript(rng, records=4)
    picture = Image.fromarray(rng.integers(256, size=(84, 84, 3), dtype=np.uint8))
    places = tuple(None if char in " \n" else tuple(rng.random(2)) for char in TEXT)
    return Transcript(picture, TEXT, places)


def test_scores_equal_those_of_full_attention_matrices(checkpoint):
    model = load_model(checkpoint, dtype="float32")
    transcripts = [transcript(checkpoint, seed) for seed in range(3)]
    scores = head_scores(model, checkpoint, transcripts)
    config = model.get_decoder().config
    expected = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
    model.set_attn_implementation("eager")
    image_token = checkpoint.config.image_token_id
    for one in transcripts:
        inputs = dict(prepare(checkpoint, [one.picture], PROMPT))
        prompt = inputs["input_ids"].shape[1]
        # Both tokenizers have one token a character of such texts.
        ids = torch.tensor([checkpoint.processor.tokenizer(one.text, add_special_tokens=False)["input_ids"]])
        assert ids.shape[1] == len(one.text)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        first = int((inputs["input_ids"][0] == image_token).nonzero()[0])
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        for layer, attention in enumerate(attentions):
            for head, rows in enumerate(attention[0]):
                for index, place in enumerate(one.places[1:], start=1):
                    keys = shown_by(checkpoint, place, first) if place else []
                    if int(rows[prompt + index - 1].argmax()) in keys:
                        expected[layer, head] += 1 / len(keys) / len(transcripts)
    assert expected.any()
    grouped = expected.unflatten(1, (config.num_key_value_heads, -1)).mean(-1)
    assert_close(torch.tensor(scores), grouped)


def shown_by(checkpoint, place, first):
    """Vision tokens that show a place of a square picture."""
    (x, y), side = place, int(checkpoint.config.vision_config.image_size // checkpoint.config.vision_config.patch_size)
    keys = [first + int(y * side) * side + int(x * side)]
    if checkpoint.config.model_type == "llava_next":
        # After the base tile come two by two tiles, whose rows end in a token of their own.
        keys.append(first + side * side + int(y * 2 * side) * (2 * side + 1) + int(x * 2 * side))
    return keys


def test_a_hit_counts_by_how_many_keys_show_the_text():
    attention = torch.tensor([[[0.1, 0.9, 0.0], [0.6, 0.3, 0.1]], [[0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]])
    assert_close(head_hits(attention, [{1, 2}, {0}]), torch.tensor([1.5, 0.5]))
    assert_close(head_hits(attention, [set(), {2}]), torch.tensor([0.0, 0.0]))


def test_places_are_found_in_every_tile():
    tiles = [
        Tile("a", torch.empty(0), torch.arange(4).view(2, 2)),
        Tile("b", torch.empty(0), 10 + torch.arange(16).view(4, 4)),
    ]
    assert vision_tokens(tiles, [(0.6, 0.1), None, (1.0, 1.0)]) == {1, 3, 10 + 2, 10 + 15}
    assert vision_tokens(tiles, [None]) == set()


def test_transcripts_say_where_each_character_stands():
    for seed in range(20):
        one = random_transcript(np.random.default_rng(seed))
        assert len(one.places) == len(one.text)
        assert [place is None for place in one.places] == [char in " \n" for char in one.text]
        lines = [[p for p in places if p] for places in np.split(np.array(one.places, dtype=object), _breaks(one.text))]
        # Records go down the page, and their characters from left to right.
        assert all(a[0][1] < b[0][1] for a, b in itertools.pairwise(lines))
        assert all(p[0] < q[0] for line in lines for p, q in itertools.pairwise(line))


def _breaks(text):
    return [index + 1 for index, char in enumerate(text) if char == "\n"]


def test_no_transcript_is_refused():
    checkpoint = load_checkpoint(str(model_path()))
    with pytest.raises(ValueError, match="at least one image"):
        head_scores(load_model(checkpoint), checkpoint, [])


def test_the_shipped_scores_are_those_of_the_shipped_model():
    checkpoint = load_checkpoint(str(model_path()))
    text = checkpoint.config.text_config
    VisualHeads(read_scores(head_scores_path())).check_model(text.num_hidden_layers, text.num_key_value_heads)
