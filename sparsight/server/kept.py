"""``GET /v1/sparsight/kept/{id}``: the image patches that the cache of a finished request kept."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from fastapi import APIRouter, Request
from pydantic import BaseModel
from torch import Tensor

from sparsight.cache.report import Report
from sparsight.engine.recall_log import Recalled
from sparsight.models.layouts import Box
from sparsight.server.errors import APIError
from sparsight.server.prompts import Grid
from sparsight.server.schema import ERRORS

router = APIRouter()


@dataclass(frozen=True)
class Kept:
    """What a cache kept of one prompt.

    Args:
        key_id: of the API key that the request came with.
        report: the cache's report.
        grids: the patch grids of the prompt's images.
        positions: as :attr:`sparsight.Handle.kept_positions`.
        recalled: as :attr:`sparsight.Handle.recalled`.
        characters: of each token of the first answer.
    """

    key_id: str | None
    report: Report
    grids: Sequence[Grid]
    positions: Mapping[int, Tensor]
    recalled: Sequence[Recalled] = ()
    characters: Sequence[int] = ()


class KeptStore:
    """The newest requests.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._newest: OrderedDict[str, Kept] = OrderedDict()

    def add(self, id: str, kept: Kept) -> None:
        """Add a request, and forget the oldest if there are too many."""
        self._newest[id] = kept
        while len(self._newest) > self._size:
            self._newest.popitem(last=False)

    def find(self, id: str, key_id: str | None) -> Kept:
        """A request by its id.

        Raises:
            APIError: it is not there, or came with another key.
        """
        kept = self._newest.get(id)
        if kept is None or kept.key_id != key_id:
            message = "There is no such request with an image among the newest."
            raise APIError(404, message, param="id", code="not_found")
        return kept


class KeptTile(BaseModel):
    """A rectangle of the prompt's ``image``-th image, of ``width`` x ``height`` pixels as the model gets them.

    It is cut into patches. ``box`` has its left, top, right and bottom in the image as it was sent, as fractions of the
    sides, and beyond them where the model adds a margin; it is null where it is not known how the model cuts images.
    """

    name: str
    image: int
    box: Box | None
    rows: int
    columns: int
    width: int
    height: int


class KeptHead(BaseModel):
    """What a KV head keeps: of each tile the patches, counted row by row, and of the other tokens how many."""

    patches: list[list[int]]
    others: int


class KeptLayer(BaseModel):
    """What the KV heads of a layer keep."""

    layer: int
    heads: list[KeptHead]


class KeptRecall(BaseModel):
    """What is held after a recall, from the ``token``-th token of the first answer on, counted from 0.

    ``held`` has of each tile and each of its patches, row by row, how many KV heads of all layers together hold it;
    ``fetched`` how many of these had not kept it of the prompt.
    """

    token: int
    held: list[list[int]]
    fetched: list[list[int]]


class KeptEntries(BaseModel):
    """What the cache of a request kept of its prompt.

    With a method that recalls, ``recalls`` follow, and ``token_characters`` has how many characters of the first
    answer's text each of its tokens stands for.
    """

    id: str
    method: str
    budget: float
    prompt_tokens: int
    vision_tokens: int
    tiles: list[KeptTile]
    layers: list[KeptLayer]
    recalls: list[KeptRecall]
    token_characters: list[int]


def key_of(request: Request) -> str | None:
    """The id of the API key that a request came with."""
    return getattr(request.state, "key_id", None)


# In a thread of its own: large prompts have many entries.
@router.get("/v1/sparsight/kept/{id}", responses=ERRORS)
def kept_entries(request: Request, id: str) -> KeptEntries:
    """The image patches that each KV head kept for one of the newest requests with an image."""
    kept = request.app.state.service.kept.find(id, key_of(request))
    return describe(id, kept)


def describe(id: str, kept: Kept) -> KeptEntries:
    """What a cache kept, as plain data."""
    length = kept.report.prompt_tokens[0]
    tiles = [
        KeptTile(
            name=grid.name,
            image=grid.image,
            box=grid.box,
            rows=grid.positions.shape[0],
            columns=grid.positions.shape[1],
            width=grid.width,
            height=grid.height,
        )
        for grid in kept.grids
    ]
    cells = [grid.positions.flatten() for grid in kept.grids]
    layers = []
    for layer, positions in kept.positions.items():
        heads = []
        for head in positions:
            held = torch.zeros(length, dtype=torch.bool)
            held[head[head >= 0].long()] = True
            patches = [held[each].nonzero()[:, 0].tolist() for each in cells]
            heads.append(KeptHead(patches=patches, others=int(held.sum()) - sum(map(len, patches))))
        layers.append(KeptLayer(layer=layer, heads=heads))
    recalls = [
        KeptRecall(
            token=recalled.token,
            held=[recalled.held[each].tolist() for each in cells],
            fetched=[recalled.fetched[each].tolist() for each in cells],
        )
        for recalled in kept.recalled
    ]
    report = kept.report
    return KeptEntries(
        id=id,
        method=report.method,
        budget=report.budget,
        prompt_tokens=length,
        vision_tokens=report.vision_tokens[0],
        tiles=tiles,
        layers=layers,
        recalls=recalls,
        token_characters=list(kept.characters) if recalls else [],
    )
