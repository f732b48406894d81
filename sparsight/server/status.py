"""``/health``, ``/ready`` and ``/v1/models``."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from sparsight.server.errors import APIError, stopping
from sparsight.server.schema import ERRORS
from sparsight.server.service import Service

router = APIRouter()


class Status(BaseModel):
    """All is well."""

    status: Literal["ok"] = "ok"


class Model(BaseModel):
    """A model that the server has."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sparsight"] = "sparsight"


class Models(BaseModel):
    """The models that the server has."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/health", responses=ERRORS)
async def health(request: Request) -> Status:
    """Whether the server is alive."""
    service: Service = request.app.state.service
    if service.loop.failed:
        raise APIError(500, "The engine has failed.", kind="server_error")
    return Status()


@router.get("/ready", responses=ERRORS)
async def ready(request: Request) -> Status:
    """Whether the server takes requests."""
    service: Service = request.app.state.service
    if service.draining or service.loop.failed:
        raise stopping()
    return Status()


@router.get("/v1/models", responses=ERRORS)
async def models(request: Request) -> Models:
    """The model that the server has."""
    return Models(data=[_model(request.app.state.service)])


@router.get("/v1/models/{model:path}", responses=ERRORS)
async def model(request: Request, model: str) -> Model:
    """The model of this name."""
    service: Service = request.app.state.service
    service.check_model(model)
    return _model(service)


def _model(service: Any) -> Model:
    return Model(id=service.name, created=service.created)
