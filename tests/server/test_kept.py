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
