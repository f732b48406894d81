"""What the cache of a finished request kept, patch by patch."""

import httpx2
import pytest
import torch

import sparsight
from sparsight import CompressedCache, VLCache
from sparsight.models.images import open_image
from sparsight.models.inputs import prepare
from sparsight.models.loading import Checkpoint
from sparsight.server.errors import APIError
from sparsight.server.kept import Kept, KeptStore
from tests.server.conftest import MODEL, QUESTION, RECEIPT, asking


def kept(server, id, **options):
    return httpx2.get(f"{server.url}/v1/sparsight/kept/{id}", **options)


@pytest.mark.parametrize("stream", [False, True])
def test_patches_are_those_of_the_cache(server, client, stream):
    answer = client.chat.completions.create(
        model=MODEL, messages=asking(), stream=stream, extra_body={"sparsight": {"method": "vl-cache", "budget": 0.2}}
    )
    id = {each.id for each in answer}.pop() if stream else answer.id
    response = kept(server, id)
    assert response.status_code == 200 and len(response.content) < 2**15
    body = response.json()
    assert (body["id"], body["method"], body["budget"]) == (id, "vl-cache", 0.2)
    assert (body["prompt_tokens"], body["vision_tokens"]) == (587, 576)
    (tile,) = body["tiles"]
    assert [tile[name] for name in ("rows", "columns", "width", "height")] == [24, 24, 336, 336]

    model, processor = sparsight.load()
    inputs = prepare(Checkpoint("", model.config, processor), [open_image(RECEIPT)], QUESTION)
    inputs = inputs.to(model.device, model.dtype)
    cache = CompressedCache(model, VLCache(budget=0.2), inputs)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    assert [each["layer"] for each in body["layers"]] == cache.report().layers
    for layer in body["layers"]:
        held = cache.kept_positions(layer["layer"])[0].tolist()
        assert len(held) == len(layer["heads"])
        for positions, head in zip(held, layer["heads"], strict=True):
            patches = [position - first for position in positions if first <= position < first + 576]
            assert head["patches"] == [patches]
            assert head["others"] == sum(position >= 0 for position in positions) - len(patches)


def test_after_each_recall_it_says_how_many_heads_hold_a_patch(server, client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=asking("Read the page."),
        max_tokens=10,
        temperature=0,
        extra_body={"sparsight": {"method": "sparsight-recall"}},
    )
    body = kept(server, answer.id).json()
    assert len(body["token_characters"]) == answer.usage.completion_tokens == 10
    assert sum(body["token_characters"]) == len(answer.choices[0].message.content)
    assert [recall["token"] for recall in body["recalls"]] == [1, 5, 9]

    # The same answer, a token at a time, on a cache that is looked into after each.
    model, processor = sparsight.load()
    inputs = prepare(Checkpoint("", model.config, processor), [open_image(RECEIPT)], "Read the page.")
    inputs = inputs.to(model.device, model.dtype)
    cache = CompressedCache(model, sparsight.recipe("sparsight-recall"), inputs)
    with torch.no_grad():
        token = model(**inputs, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])

    def heads():
        layers = [cache.kept_positions(layer)[0].tolist() for layer in cache.report().layers]
        return [{position - first for position in head} for layer in layers for head in layer]

    before, mask = heads(), inputs["attention_mask"]
    for number in range(1, 10):
        mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], 1)
        with torch.no_grad():
            logits = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        if number in (1, 5, 9):
            recall, after = body["recalls"][number // 4], heads()
            assert recall["held"] == [[sum(patch in head for head in after) for patch in range(576)]]
            new = [head - old for head, old in zip(after, before, strict=True)]
            assert recall["fetched"] == [[sum(patch in head for head in new) for patch in range(576)]]
            assert sum(recall["fetched"][0]) > 0


def test_a_method_without_recall_has_none(server, client):
    answer = client.chat.completions.create(model=MODEL, messages=asking(), max_tokens=3)
    body = kept(server, answer.id).json()
    assert (body["recalls"], body["token_characters"]) == ([], [])
    assert body["tiles"][0]["box"] == [0, 0, 1, 1]


def test_other_requests(server, client):
    text = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Read."}], max_tokens=2)
    for id in (text.id, "chatcmpl-none", "..%2f..%2fetc"):
        response = kept(server, id)
        assert response.status_code == 404 and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_store_forgets_the_oldest_and_asks_for_the_key():
    store = KeptStore(2)
    for number in range(3):
        store.add(str(number), Kept("key", None, (), {}))
    assert store.find("1", "key") and store.find("2", "key")
    for id, key in (("0", "key"), ("1", "other"), ("1", None)):
        with pytest.raises(APIError) as caught:
            store.find(id, key)
        assert caught.value.status == 404
