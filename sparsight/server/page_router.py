"""The page at ``/``, with the methods that it offers and examples for the model that ships."""

import base64
import inspect
import io
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from sparsight.methods import RECIPES
from sparsight.reader import model_path
from sparsight.reader.skills import Example, look_at, look_up, read_out
from sparsight.server.errors import APIError
from sparsight.server.schema import ERRORS
from sparsight.server.service import Service

router = APIRouter()

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class MethodListing(BaseModel):
    """A method; ``budget`` is its default, null where it keeps everything."""

    name: str
    description: str
    budget: float | None


class Methods(BaseModel):
    """The methods, and the one that requests get by default."""

    default: str
    budget: float
    methods: list[MethodListing]


class ExampleQuestion(BaseModel):
    """A question about an image, which is a data URL."""

    image: str
    question: str


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page."""
    return _asset("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def asset(name: str) -> Response:
    """A file of the page."""
    return _asset(name)


@router.get("/v1/sparsight/methods", responses=ERRORS)
async def methods(request: Request) -> Methods:
    """The compression methods by name."""
    service: Service = request.app.state.service
    default = service.engine.recipe
    return Methods(default=default.name, budget=default.budget, methods=[_listing(name) for name in RECIPES])


@router.get("/v1/sparsight/examples", responses=ERRORS)
async def examples(request: Request) -> list[ExampleQuestion]:
    """Images with questions that the model that ships answers; none for other models."""
    service: Service = request.app.state.service
    return _examples() if service.engine.model.name_or_path == str(model_path()) else []


def _asset(name: str) -> Response:
    """A file beside the page, by its name alone."""
    found = {each.name: each for each in files("sparsight.server").joinpath("page").iterdir()}
    if name not in found:
        raise APIError(404, "There is no such path.")
    return Response(found[name].read_bytes(), media_type=TYPES[PurePosixPath(name).suffix], headers=HEADERS)


def _listing(name: str) -> MethodListing:
    make = RECIPES[name]
    budget = make().budget
    summary = " ".join((inspect.getdoc(make) or "").split("\n\n")[0].split())
    return MethodListing(name=name, description=summary, budget=budget if budget < 1 else None)


@cache
def _examples() -> list[ExampleQuestion]:
    rng = np.random.default_rng(3)
    split = "heldout"
    drawn = [look_up(rng, split, 8), look_up(rng, split, 32), read_out(rng, split, 8), look_at(rng, split)]
    return [ExampleQuestion(image=_data_url(example), question=example.turns[0][0]) for example in drawn]


def _data_url(example: Example) -> str:
    file = io.BytesIO()
    example.pictures()[0].save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
